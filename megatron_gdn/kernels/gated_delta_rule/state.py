"""Second stage of the chunked rule: the recurrence of the state, chunk after chunk.

    R = beta (v - gamma rk (k S))        U = T R        S' = gamma_C S + k^T (lambda rk U)

gamma = exp(G) is the decay since the chunk's start, lambda = exp(G_C - G) that to its end. The state is float32 in
registers; products read it rounded to the inputs' dtype, and that is what is kept of it for the other stages. Each
column of v has a state of its own, so programs share a sequence by columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_gdn.kernels.gated_delta_rule.prepare import DTYPES, SHIPPED, Prepared, columns
from megatron_gdn.kernels.triton_support.configs import architecture, config, config_name
from megatron_gdn.kernels.triton_support.language import dot, store
from megatron_gdn.kernels.triton_support.offline import Case, strides
from megatron_gdn.kernels.triton_support.sequences import locate_sequence
from megatron_gdn.kernels.varlen import CHUNK_SIZE, ChunkTable


@triton.jit
def advance_state(b_S, b_k, b_v, b_beta, b_T, b_G, total, b_rk, DTYPE: tl.constexpr):
    """U of a chunk, and the state after it; total: the last of G, b_rk: what normalises the rows of k."""
    b_R = b_beta[:, None] * (b_v.to(tl.float32) - (tl.exp2(b_G) * b_rk)[:, None] * dot(b_k, b_S, DTYPE))
    # Padded rows have beta = 0 and T = identity: U is 0 there.
    b_U = dot(b_T, b_R, DTYPE)
    b_write = tl.exp2(total - b_G) * b_rk
    return b_U, b_S * tl.exp2(total) + dot(tl.trans(b_k), b_write[:, None] * b_U, DTYPE)


@triton.jit(do_not_specialize=["num_tokens"])
def state_kernel(
    k,
    v,
    beta,
    G,
    T,
    rk,
    S,
    U,
    initial_state,
    final_state,
    first_chunk,
    chunk_bounds,
    order,
    num_tokens,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_bb,
    stride_bt,
    stride_bh,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    L2NORM: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
    BV: tl.constexpr,
):
    """One program per block of columns, value head and sequence; the longest sequences start first."""
    DTYPE: tl.constexpr = k.dtype.element_ty
    NUM_V: tl.constexpr = (V + BV - 1) // BV
    i = tl.program_id(0).to(tl.int64)
    i_v, i_h = i % NUM_V, i // NUM_V % HV
    i_hk = i_h // (HV // H)
    i_n = tl.load(order + i // (NUM_V * HV))
    first, num_chunks, i_b, i_t, length = locate_sequence(i_n, first_chunk, chunk_bounds, num_tokens)

    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), tl.arange(0, BV)
    m_k, m_v = columns(o_k, K, BK), columns(i_v * BV + o_v, V, BV)
    m_s = m_k[:, None] & m_v[None, :]
    o_s = o_k[:, None] * V + (i_v * BV + o_v)[None, :]
    p_k = k + i_b * stride_kb + i_hk * stride_kh + o_c[:, None] * stride_kt + o_k[None, :]
    p_v = v + i_b * stride_vb + i_h * stride_vh + i_v * BV + o_c[:, None] * stride_vt + o_v[None, :]
    p_beta = beta + i_b * stride_bb + i_h * stride_bh + o_c * stride_bt
    o_T = o_c[:, None] * C + o_c[None, :]
    o_u = o_c[:, None] * V + (i_v * BV + o_v)[None, :]

    b_S = tl.zeros([BK, BV], tl.float32)
    if INITIAL:
        b_S = tl.load(initial_state + (i_n * HV + i_h) * K * V + o_s, mask=m_s, other=0.0).to(tl.float32)
    for j in range(0, num_chunks):
        token = i_t + j * C
        i_c = (first + j).to(tl.int64)
        i_r = i_c * HV + i_h
        m_c = o_c < length - j * C
        b_k = tl.load(p_k + token * stride_kt, mask=m_c[:, None] & m_k[None, :], other=0.0)
        b_v = tl.load(p_v + token * stride_vt, mask=m_c[:, None] & m_v[None, :], other=0.0)
        b_beta = tl.load(p_beta + token * stride_bt, mask=m_c, other=0.0).to(tl.float32)
        b_T = tl.load(T + i_r * C * C + o_T)
        b_G, total = tl.load(G + i_r * C + o_c), tl.load(G + i_r * C + C - 1)
        b_rk = tl.full([C], 1.0, tl.float32)
        if L2NORM:
            b_rk = tl.load(rk + (i_c * H + i_hk) * C + o_c)
        store(S + i_r * K * V + o_s, b_S, mask=m_s)
        b_U, b_S = advance_state(b_S, b_k, b_v, b_beta, b_T, b_G, total, b_rk, DTYPE)
        store(U + i_r * C * V + o_u, b_U, mask=m_v[None, :])
    if FINAL:
        tl.store(final_state + (i_n * HV + i_h) * K * V + o_s, b_S, mask=m_s)


def states(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    prepared: Prepared,
    *,
    table: ChunkTable,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """States and new values of all chunks.

    Args:
        k, v: `[B, T, H, K]` and `[B, T, HV, V]`, any strides but 1 for K and V.
        beta: `[B, T, HV]`, any float dtype and strides.
        prepared, table: of the batch.
        initial_state: `[N, HV, K, V]`, any float dtype; None for zeros.
        output_final_state: return the last of them.

    Returns:
        S `[NC, HV, K, V]`, the states that enter the chunks, and U `[NC, HV, C, V]`, 0 in padded rows, in v's dtype;
        final states `[N, HV, K, V]` float32, or None.
    """
    num_chunks, num_sequences = table.num_chunks, len(table.lengths)
    H, K, (_, num_tokens, HV, V) = *k.shape[2:], v.shape
    S, U = v.new_empty(num_chunks, HV, K, V), v.new_empty(num_chunks, HV, CHUNK_SIZE, V)
    final_state = v.new_empty(num_sequences, HV, K, V, dtype=torch.float32) if output_final_state else None
    launch = config(config_name("state", k.dtype), architecture(k.device), K, V).launch
    state_kernel[(triton.cdiv(V, launch["BV"]) * HV * num_sequences,)](
        k,
        v,
        beta,
        prepared.G,
        prepared.T,
        prepared.rk,
        S,
        U,
        None if initial_state is None else initial_state.contiguous(),
        final_state,
        table.first_chunk,
        table.chunk_bounds,
        table.order,
        max(num_tokens, 1),
        *k.stride()[:3],
        *v.stride()[:3],
        *beta.stride(),
        H=H,
        HV=HV,
        K=K,
        V=V,
        C=CHUNK_SIZE,
        BK=max(16, triton.next_power_of_2(K)),
        L2NORM=prepared.rk is not None,
        INITIAL=initial_state is not None,
        FINAL=output_final_state,
        **launch,
    )
    return S, U, final_state


def compile_cases(arch: str) -> list[Case]:
    """The kernel at the shapes that are shipped, with everything on."""
    cases = []
    for K, V, dtype, default in SHIPPED:
        x = f"*{dtype}"
        signature = dict(k=x, v=x, beta="*fp32", G="*fp32", T=x, rk="*fp32", S=x, U=x, initial_state="*fp32")
        signature |= dict(final_state="*fp32", first_chunk="*i32", chunk_bounds="*i32", order="*i64", num_tokens="i32")
        constexprs = dict(H=16, HV=32, K=K, V=V, C=CHUNK_SIZE, BK=triton.next_power_of_2(K))
        cases.append(
            Case(
                name=f"state {K}/{V} {dtype}",
                kernel=state_kernel,
                signature=signature | strides("k", "v", "b"),
                constexprs=constexprs | dict(L2NORM=True, INITIAL=True, FINAL=True),
                config=config(config_name("state", DTYPES[dtype]), arch, K, V),
                default=default,
            )
        )
    return cases
