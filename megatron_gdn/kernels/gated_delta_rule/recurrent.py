"""Decoding: the recurrence itself, token by token, with the state in registers.

    S' = exp(g_t) S        u = beta_t (v_t - k_t S')        S = S' + k_t^T u        o_t = scale q_t S

All arithmetic is float32. One token reads and writes the whole state, 128 KiB per head at K = V = 128, and little else,
so the kernel moves at the speed of memory; over many tokens `chunk_gated_delta_rule` is faster.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_gdn.kernels.gated_delta_rule.prepare import SHIPPED, columns
from megatron_gdn.kernels.triton_support.configs import architecture, config
from megatron_gdn.kernels.triton_support.language import INTERPRETED, LOG2_E, store
from megatron_gdn.kernels.triton_support.offline import Case, strides
from megatron_gdn.kernels.varlen import ChunkTable


@triton.jit(do_not_specialize=["num_tokens"])
def recurrent_kernel(
    q,
    k,
    v,
    g,
    beta,
    o,
    initial_state,
    final_state,
    bounds,
    num_tokens,
    scale,
    eps,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_gb,
    stride_gt,
    stride_gh,
    stride_bb,
    stride_bt,
    stride_bh,
    stride_ob,
    stride_ot,
    stride_oh,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    L2NORM: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
    BV: tl.constexpr,
):
    """One program per block of columns, value head and sequence."""
    NUM_V: tl.constexpr = (V + BV - 1) // BV
    i = tl.program_id(0).to(tl.int64)
    i_v, i_h, i_n = i % NUM_V, i // NUM_V % HV, i // (NUM_V * HV)
    i_hk = i_h // (HV // H)
    start, end = tl.load(bounds + i_n), tl.load(bounds + i_n + 1)
    i_b, i_t = start // num_tokens, start % num_tokens
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = columns(o_k, K, BK), columns(o_v, V, BV)
    m_s = m_k[:, None] & m_v[None, :]
    o_s = (i_n * HV + i_h) * K * V + o_k[:, None] * V + o_v[None, :]
    p_q = q + i_b * stride_qb + i_t * stride_qt + i_hk * stride_qh + o_k
    p_k = k + i_b * stride_kb + i_t * stride_kt + i_hk * stride_kh + o_k
    p_v = v + i_b * stride_vb + i_t * stride_vt + i_h * stride_vh + o_v
    p_g = g + i_b * stride_gb + i_t * stride_gt + i_h * stride_gh
    p_beta = beta + i_b * stride_bb + i_t * stride_bt + i_h * stride_bh
    p_o = o + i_b * stride_ob + i_t * stride_ot + i_h * stride_oh + o_v

    b_S = tl.zeros([BK, BV], tl.float32)
    if INITIAL:
        b_S = tl.load(initial_state + o_s, mask=m_s, other=0.0).to(tl.float32)
    for _ in range(0, end - start):
        b_q = tl.load(p_q, mask=m_k, other=0.0).to(tl.float32)
        b_k = tl.load(p_k, mask=m_k, other=0.0).to(tl.float32)
        b_v = tl.load(p_v, mask=m_v, other=0.0).to(tl.float32)
        b_g, b_beta = tl.load(p_g).to(tl.float32), tl.load(p_beta).to(tl.float32)
        if L2NORM:
            b_q *= tl.rsqrt(tl.sum(b_q * b_q, 0) + eps)
            b_k *= tl.rsqrt(tl.sum(b_k * b_k, 0) + eps)
        b_S *= tl.exp2(b_g * LOG2_E)
        b_u = b_beta * (b_v - tl.sum(b_k[:, None] * b_S, 0))
        b_S += b_k[:, None] * b_u[None, :]
        store(p_o, scale * tl.sum(b_q[:, None] * b_S, 0), mask=m_v)
        p_q, p_k, p_v, p_o = p_q + stride_qt, p_k + stride_kt, p_v + stride_vt, p_o + stride_ot
        p_g, p_beta = p_g + stride_gt, p_beta + stride_bt
    if FINAL:
        store(final_state + o_s, b_S, mask=m_s)


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    table: ChunkTable,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    l2norm_eps: float | None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The rule token by token, forward only; everything else is checked by `fused_recurrent_gated_delta_rule`.

    Args:
        q, k: `[B, T, H, K]` float32, float16 or bfloat16, any strides.
        v: `[B, T, HV, V]`, likewise.
        g, beta: `[B, T, HV]`, any float dtype and strides; g natural log.
        table: of the batch.
        scale: of o.
        initial_state: `[N, HV, K, V]`, any float dtype; None for zeros.
        output_final_state: return the state after each sequence.
        l2norm_eps: added to the sums of squares of q and k; None: they are used as they are.
        in_place: write the states over initial_state, a contiguous pool, in its dtype, and return it.

    Returns:
        o `[B, T, HV, V]` in v's dtype; the states `[N, HV, K, V]`, float32 or the pool, or None.

    Raises:
        ValueError: a gradient is needed; in_place without a contiguous initial_state.
    """
    inputs = (q, k, v, g, beta, initial_state)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        raise ValueError(
            "fused_recurrent_gated_delta_rule (backend triton) computes no gradients, and an input requires them: use "
            "chunk_gated_delta_rule, or call it under torch.no_grad()."
        )
    if in_place and (initial_state is None or not initial_state.is_contiguous()):
        shown = "None" if initial_state is None else f"strides {list(initial_state.stride())}"
        raise ValueError(f"initial_state ({shown}) must be contiguous to be updated in place: pass the pool itself.")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    num_sequences, H, K, (_, num_tokens, HV, V) = len(table.lengths), *k.shape[2:], v.shape
    o = v.new_empty(v.shape)
    final_state = None
    if in_place:
        final_state = initial_state
    elif output_final_state:
        final_state = v.new_empty(num_sequences, HV, K, V, dtype=torch.float32)
    launch = config("recurrent", architecture(v.device), K, V).launch
    if INTERPRETED:
        # There the number of programs is what takes time.
        launch["BV"] = triton.next_power_of_2(V)
    with torch.cuda.device_of(v):
        recurrent_kernel[(triton.cdiv(V, launch["BV"]) * HV * num_sequences,)](
            q,
            k,
            v,
            g,
            beta,
            o,
            None if initial_state is None else initial_state.contiguous(),
            final_state,
            table.bounds,
            max(num_tokens, 1),
            scale,
            0.0 if l2norm_eps is None else l2norm_eps,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *g.stride(),
            *beta.stride(),
            *o.stride()[:3],
            H=H,
            HV=HV,
            K=K,
            V=V,
            BK=triton.next_power_of_2(K),
            L2NORM=l2norm_eps is not None,
            INITIAL=initial_state is not None,
            FINAL=final_state is not None,
            **launch,
        )
    return o, final_state


def compile_cases(arch: str) -> list[Case]:
    """The kernel at the shapes that are shipped, with everything on."""
    cases = []
    for K, V, dtype, default in SHIPPED:
        x = f"*{dtype}"
        signature = dict(q=x, k=x, v=x, g="*fp32", beta="*fp32", o=x, initial_state="*fp32", final_state="*fp32")
        signature |= dict(bounds="*i64", num_tokens="i32", scale="fp32", eps="fp32")
        constexprs = dict(H=16, HV=32, K=K, V=V, BK=triton.next_power_of_2(K))
        cases.append(
            Case(
                name=f"recurrent {K}/{V} {dtype}",
                kernel=recurrent_kernel,
                signature=signature | strides("q", "k", "v", "g", "b", "o"),
                constexprs=constexprs | dict(L2NORM=True, INITIAL=True, FINAL=True),
                config=config("recurrent", arch, K, V),
                default=default,
            )
        )
    return cases
