"""A stretch of tokens as an affine map of the state: the recurrence of `state.py` with extended values.

The columns of the state do not depend on each other, so S and M are one state `[K, V + K]` that starts from [0 | I] and
whose last K columns have no values. Nothing but its end is stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_gdn.kernels.gated_delta_rule.prepare import DTYPES, SHIPPED, Prepared, columns
from megatron_gdn.kernels.gated_delta_rule.state import advance_state
from megatron_gdn.kernels.triton_support.configs import architecture, config, config_name
from megatron_gdn.kernels.triton_support.offline import Case, strides
from megatron_gdn.kernels.triton_support.sequences import locate_sequence
from megatron_gdn.kernels.varlen import CHUNK_SIZE, ChunkTable


@triton.jit(do_not_specialize=["num_tokens"])
def affine_map_kernel(
    k,
    v,
    beta,
    G,
    T,
    rk,
    M,
    S,
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
    BV: tl.constexpr,
):
    """One program per block of columns of S or of M, value head and sequence; the longest sequences start first."""
    DTYPE: tl.constexpr = k.dtype.element_ty
    NUM_V: tl.constexpr = (V + BV - 1) // BV
    NUM: tl.constexpr = NUM_V + (K + BV - 1) // BV
    i = tl.program_id(0).to(tl.int64)
    i_block, i_h = i % NUM, i // NUM % HV
    i_hk = i_h // (HV // H)
    i_n = tl.load(order + i // (NUM * HV))
    first, num_chunks, i_b, i_t, length = locate_sequence(i_n, first_chunk, chunk_bounds, num_tokens)

    of_S = i_block < NUM_V
    o_c, o_k = tl.arange(0, C), tl.arange(0, BK)
    o_v = tl.where(of_S, i_block, i_block - NUM_V) * BV + tl.arange(0, BV)
    m_k, m_v, m_M = columns(o_k, K, BK), o_v < tl.where(of_S, V, 0), o_v < tl.where(of_S, 0, K)
    p_k = k + i_b * stride_kb + i_hk * stride_kh + o_c[:, None] * stride_kt + o_k[None, :]
    p_v = v + i_b * stride_vb + i_h * stride_vh + o_c[:, None] * stride_vt + o_v[None, :]
    p_beta = beta + i_b * stride_bb + i_h * stride_bh + o_c * stride_bt
    o_T = o_c[:, None] * C + o_c[None, :]

    b_S = tl.where((o_k[:, None] == o_v[None, :]) & m_M[None, :], 1.0, 0.0)
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
        _, b_S = advance_state(b_S, b_k, b_v, b_beta, b_T, b_G, total, b_rk, DTYPE)
    i_nh = i_n * HV + i_h
    tl.store(S + i_nh * K * V + o_k[:, None] * V + o_v[None, :], b_S, mask=m_k[:, None] & m_v[None, :])
    tl.store(M + i_nh * K * K + o_k[:, None] * K + o_v[None, :], b_S, mask=m_k[:, None] & m_M[None, :])


def affine_maps(k: Tensor, v: Tensor, beta: Tensor, prepared: Prepared, *, table: ChunkTable) -> tuple[Tensor, Tensor]:
    """M and S of each sequence of a table.

    Args:
        k, v: `[B, T, H, K]` and `[B, T, HV, V]`, any strides but 1 for K and V.
        beta: `[B, T, HV]`, any float dtype and strides.
        prepared: of the chunks of the table.
        table: of the batch, or a selection of its sequences.

    Returns:
        M `[N, HV, K, K]` and S `[N, HV, K, V]`, float32.
    """
    num_sequences = len(table.lengths)
    H, K, (_, num_tokens, HV, V) = *k.shape[2:], v.shape
    M, S = (v.new_empty(num_sequences, HV, K, size, dtype=torch.float32) for size in (K, V))
    launch = config(config_name("affine_map", k.dtype), architecture(k.device), K, V).launch
    blocks = triton.cdiv(V, launch["BV"]) + triton.cdiv(K, launch["BV"])
    affine_map_kernel[(blocks * HV * num_sequences,)](
        k,
        v,
        beta,
        prepared.G,
        prepared.T,
        prepared.rk,
        M,
        S,
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
        **launch,
    )
    return M, S


def compile_cases(arch: str) -> list[Case]:
    """The kernel at the shapes that are shipped."""
    cases = []
    for K, V, dtype, default in SHIPPED:
        x = f"*{dtype}"
        signature = dict(k=x, v=x, beta="*fp32", G="*fp32", T=x, rk="*fp32", M="*fp32", S="*fp32")
        signature |= dict(first_chunk="*i32", chunk_bounds="*i32", order="*i64", num_tokens="i32")
        constexprs = dict(H=16, HV=32, K=K, V=V, C=CHUNK_SIZE, BK=triton.next_power_of_2(K), L2NORM=True)
        cases.append(
            Case(
                name=f"affine map {K}/{V} {dtype}",
                kernel=affine_map_kernel,
                signature=signature | strides("k", "v", "b"),
                constexprs=constexprs,
                config=config(config_name("affine_map", DTYPES[dtype]), arch, K, V),
                default=default,
            )
        )
    return cases
