"""Third stage of the chunked rule: the output, all chunks at once.

    O = scale (gamma rq (q S) + P U)        P_ij = exp(G_i - G_j) rq_i rk_j q_i . k_j for i >= j

Two accumulators go through K together, those of q S and of q k^T.
"""

import triton
import triton.language as tl
from torch import Tensor

from megatron_gdn.kernels.gated_delta_rule.prepare import DTYPES, SHIPPED, Prepared, columns
from megatron_gdn.kernels.triton_support.configs import architecture, config, config_name
from megatron_gdn.kernels.triton_support.language import dot, store
from megatron_gdn.kernels.triton_support.offline import Case, strides
from megatron_gdn.kernels.varlen import CHUNK_SIZE, ChunkTable


@triton.jit(do_not_specialize=["num_tokens"])
def output_kernel(
    q,
    k,
    G,
    rq,
    rk,
    S,
    U,
    o,
    chunk_bounds,
    num_tokens,
    scale,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_ob,
    stride_ot,
    stride_oh,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    L2NORM: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """One program per block of columns, value head and chunk."""
    DTYPE: tl.constexpr = q.dtype.element_ty
    NUM_V: tl.constexpr = (V + BV - 1) // BV
    i = tl.program_id(0).to(tl.int64)
    i_v, i_r = i % NUM_V, i // NUM_V
    i_c, i_h = i_r // HV, i_r % HV
    i_hk = i_h // (HV // H)
    start, end = tl.load(chunk_bounds + 2 * i_c), tl.load(chunk_bounds + 2 * i_c + 1)
    i_b, i_t = (start // num_tokens).to(tl.int64), (start % num_tokens).to(tl.int64)

    o_c, o_k, o_v = tl.arange(0, C), tl.arange(0, BK), tl.arange(0, BV)
    m_c, m_v = o_c < end - start, columns(i_v * BV + o_v, V, BV)
    p_q = q + i_b * stride_qb + i_t * stride_qt + i_hk * stride_qh + o_c[:, None] * stride_qt + o_k[None, :]
    p_k = k + i_b * stride_kb + i_t * stride_kt + i_hk * stride_kh + o_c[:, None] * stride_kt + o_k[None, :]
    p_S = S + i_r * K * V + i_v * BV + o_k[:, None] * V + o_v[None, :]
    b_o = tl.zeros([C, BV], tl.float32)
    b_P = tl.zeros([C, C], tl.float32)
    for i_k in range(0, K, BK):
        m_k = columns(i_k + o_k, K, BK)
        b_q = tl.load(p_q + i_k, mask=m_c[:, None] & m_k[None, :], other=0.0)
        b_k = tl.load(p_k + i_k, mask=m_c[:, None] & m_k[None, :], other=0.0)
        b_S = tl.load(p_S + i_k * V, mask=m_k[:, None] & m_v[None, :], other=0.0)
        b_o += dot(b_q, b_S, DTYPE)
        b_P += dot(b_q, tl.trans(b_k), DTYPE)

    b_G = tl.load(G + i_r * C + o_c)
    b_gamma = tl.exp2(b_G)
    m_P = (o_c[:, None] >= o_c[None, :]) & m_c[:, None] & m_c[None, :]
    b_P *= tl.exp2(tl.where(m_P, b_G[:, None] - b_G[None, :], float("-inf")))
    if L2NORM:
        o_r = (i_c * H + i_hk) * C + o_c
        b_rq, b_rk = tl.load(rq + o_r), tl.load(rk + o_r)
        b_gamma *= b_rq
        b_P *= b_rq[:, None] * b_rk[None, :]
    b_U = tl.load(U + i_r * C * V + i_v * BV + o_c[:, None] * V + o_v[None, :], mask=m_v[None, :], other=0.0)
    b_o = b_o * b_gamma[:, None] + dot(b_P, b_U, DTYPE)
    p_o = o + i_b * stride_ob + i_t * stride_ot + i_h * stride_oh + i_v * BV + o_c[:, None] * stride_ot + o_v[None, :]
    store(p_o, b_o * scale, mask=m_c[:, None] & m_v[None, :])


def output(
    q: Tensor,
    k: Tensor,
    prepared: Prepared,
    S: Tensor,
    U: Tensor,
    *,
    table: ChunkTable,
    scale: float,
    like: Tensor,
) -> Tensor:
    """The rule's output.

    Args:
        q, k: `[B, T, H, K]`, any strides but 1 for K.
        prepared, S, U: of the other stages.
        table: of the batch.
        scale: of the output.
        like: v `[B, T, HV, V]`, for shape and dtype.

    Returns:
        o `[B, T, HV, V]`, contiguous.
    """
    o = like.new_empty(like.shape)
    H, K, (_, num_tokens, HV, V) = *k.shape[2:], o.shape
    launch = config(config_name("output", k.dtype), architecture(k.device), K, V).launch
    output_kernel[(triton.cdiv(V, launch["BV"]) * HV * table.num_chunks,)](
        q,
        k,
        prepared.G,
        prepared.rq,
        prepared.rk,
        S,
        U,
        o,
        table.chunk_bounds,
        num_tokens,
        scale,
        *q.stride()[:3],
        *k.stride()[:3],
        *o.stride()[:3],
        H=H,
        HV=HV,
        K=K,
        V=V,
        C=CHUNK_SIZE,
        L2NORM=prepared.rk is not None,
        **launch,
    )
    return o


def compile_cases(arch: str) -> list[Case]:
    """The kernel at the shapes that are shipped, with the L2 norm."""
    cases = []
    for K, V, dtype, default in SHIPPED:
        x = f"*{dtype}"
        signature = dict(q=x, k=x, G="*fp32", rq="*fp32", rk="*fp32", S=x, U=x, o=x, chunk_bounds="*i32")
        cases.append(
            Case(
                name=f"output {K}/{V} {dtype}",
                kernel=output_kernel,
                signature=signature | dict(num_tokens="i32", scale="fp32") | strides("q", "k", "o"),
                constexprs=dict(H=16, HV=32, K=K, V=V, C=CHUNK_SIZE, L2NORM=True),
                config=config(config_name("output", DTYPES[dtype]), arch, K, V),
                default=default,
            )
        )
    return cases
