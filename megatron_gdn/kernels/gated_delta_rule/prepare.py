"""First stage of the chunked rule: gates, factors of the L2 norm, and T = (I + A)^-1 of every chunk.

    G_i = g_1 + .. + g_i        A_ij = beta_i exp(G_i - G_j) k_i . k_j for i > j        T = (I + A)^-1

With an L2 norm of q and k the rows are not rewritten: each is a number times the row as it came, and these numbers, rq
and rk, go where the products are. So products are of the inputs' own bits.

T comes from forward substitution in float32 on the diagonal blocks of 16 rows, all blocks at once. Neighbours X and Y
are then joined by what lies left of Y, with -Y A X: two pairs of 16 rows, then one of 32. Only these blocks are
multiplied, 2.6 kFLOP per token and value head; as products of whole 64 x 64 tiles it is 33 k, and in tf32x3 they spill
1264 bytes per thread on sm_90. Sums of powers of A would need no substitution, but with like keys their terms reach
1e10 before they cancel.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_gdn.kernels.triton_support.configs import architecture, config, config_name
from megatron_gdn.kernels.triton_support.language import LOG2_E, dot, dot_float32, store
from megatron_gdn.kernels.triton_support.offline import Case, strides
from megatron_gdn.kernels.varlen import CHUNK_SIZE, ChunkTable

# Smallest log2 of a step's decay. What is left of a state after 2^-80 is lost beside anything written since, and sums
# of larger numbers would round away the small differences within a chunk: D is exp2 of a difference of two sums.
_SMALLEST_LOG2 = tl.constexpr(-80.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What all stages read of the gates and keys; NC chunks of C = 64 rows, padded at the end of a sequence.

    G: `[NC, HV, C]` float32, log2 of the decay since the chunk's start; padded rows repeat the last value.
    T: `[NC, HV, C, C]` in k's dtype, (I + A)^-1; the identity in padded rows and columns.
    rq, rk: `[NC, H, C]` float32, what normalises the rows of q and k; None without L2 norm. Padded rows: eps^-1/2.
    """

    G: Tensor
    T: Tensor
    rq: Tensor | None
    rk: Tensor | None


@triton.jit
def columns(o, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Mask of the BLOCK offsets o that lie below SIZE; no code at all where blocks fit."""
    if SIZE % BLOCK == 0:
        return tl.full([BLOCK], 1, tl.int1)
    else:
        return o < SIZE


@triton.jit
def inverse(b_A, PRECISION: tl.constexpr):
    """(I + A)^-1 of A `[64, 64]` float32 with zeros on and above the diagonal; PRECISION of the products."""
    # Blocks of A: the four of 16 on the diagonal, what joins them in pairs, and what joins the pairs. A sum with one
    # term that is not masked takes a part of a tile where Triton has no slices.
    o_2, o_4, o_s = tl.arange(0, 2), tl.arange(0, 4), tl.arange(0, 16)
    b_4 = tl.reshape(b_A, [4, 16, 4, 16])
    to_left = (o_4[:, None] - o_4[None, :])[:, None, :, None]
    b_own = tl.sum(tl.where(to_left == 0, b_4, 0.0), 2)
    b_left = tl.reshape(tl.sum(tl.where(to_left == 1, b_4, 0.0), 2), [2, 2, 16, 16])
    m_first = (o_2 == 0)[None, :, None, None]
    b_16 = tl.sum(tl.where(m_first, 0.0, b_left), 1)  # [2, 16, 16]
    to_left = (o_2[:, None] - o_2[None, :])[:, None, :, None]
    b_32 = tl.sum(tl.sum(tl.where(to_left == 1, tl.reshape(b_A, [2, 32, 2, 32]), 0.0), 2), 0)  # [32, 32]

    b_X = tl.where(o_s[:, None] == o_s[None, :], 1.0, 0.0)[None, :, :] + tl.zeros([4, 16, 16], tl.float32)
    for i in range(1, 16):
        m_row = (o_s == i)[None, :, None]
        b_row = tl.sum(tl.where(m_row, b_own, 0.0), 1)  # [4, 16], 0 from i on
        b_known = tl.sum(b_row[:, :, None] * b_X, 1)
        b_X = tl.where(m_row, b_X - b_known[:, None, :], b_X)

    # Pairs of 16: [[X, 0], [-Y A X, Y]] from their blocks X and Y.
    b_X = tl.reshape(b_X, [2, 2, 16, 16])
    b_16 = dot_float32(tl.sum(tl.where(m_first, 0.0, b_X), 1), b_16, PRECISION)
    b_16 = dot_float32(b_16, tl.sum(tl.where(m_first, b_X, 0.0), 1), PRECISION)
    b_X = tl.where(
        to_left[None, :] == 0, b_X[:, :, :, None, :], tl.where(to_left[None, :] == 1, -b_16[:, None, :, None, :], 0.0)
    )
    b_X = tl.reshape(b_X, [2, 32, 32])
    # The pair of 32.
    m_first = (o_2 == 0)[:, None, None]
    b_32 = dot_float32(tl.sum(tl.where(m_first, 0.0, b_X), 0), b_32, PRECISION)
    b_32 = dot_float32(b_32, tl.sum(tl.where(m_first, b_X, 0.0), 0), PRECISION)
    b_X = tl.where(to_left == 0, b_X[:, :, None, :], tl.where(to_left == 1, -b_32[None, :, None, :], 0.0))
    return tl.reshape(b_X, [64, 64])


@triton.jit
def row_factors(p_x, m_c, o_k, eps, C: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """1 / sqrt(sum of squares + eps) of C rows; p_x: `[C, BK]` pointers to their first columns."""
    b_sum = tl.zeros([C], tl.float32)
    for i_k in range(0, K, BK):
        mask = m_c[:, None] & columns(i_k + o_k, K, BK)[None, :]
        b_x = tl.load(p_x + i_k, mask=mask, other=0.0).to(tl.float32)
        b_sum += tl.sum(b_x * b_x, 1)
    return tl.rsqrt(b_sum + eps)


@triton.jit(do_not_specialize=["num_tokens"])
def prepare_kernel(
    q,
    k,
    g,
    beta,
    G,
    T,
    rq,
    rk,
    chunk_bounds,
    num_tokens,
    eps,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_gb,
    stride_gt,
    stride_gh,
    stride_bb,
    stride_bt,
    stride_bh,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    L2NORM: tl.constexpr,
    GIVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
):
    """One program per chunk and value head; the first value head of a group also writes rq and rk.

    GIVEN: rq and rk are there, and q is not read.
    """
    DTYPE: tl.constexpr = k.dtype.element_ty
    i = tl.program_id(0).to(tl.int64)
    i_c, i_h = i // HV, i % HV
    i_hk = i_h // (HV // H)
    start, end = tl.load(chunk_bounds + 2 * i_c), tl.load(chunk_bounds + 2 * i_c + 1)
    i_b, i_t = (start // num_tokens).to(tl.int64), (start % num_tokens).to(tl.int64)
    o_c, o_k = tl.arange(0, C), tl.arange(0, BK)
    m_c = o_c < end - start

    p_g = g + i_b * stride_gb + i_t * stride_gt + i_h * stride_gh
    b_g = tl.load(p_g + o_c * stride_gt, mask=m_c, other=0.0).to(tl.float32) * LOG2_E
    b_g = tl.where(b_g < _SMALLEST_LOG2, _SMALLEST_LOG2, b_g)
    # In float64 each sum is rounded once, so that the difference of two is off by one rounding and not by their number.
    b_G = tl.cumsum(b_g.to(tl.float64), 0).to(tl.float32)
    tl.store(G + i * C + o_c, b_G)

    p_k = k + i_b * stride_kb + i_t * stride_kt + i_hk * stride_kh + o_c[:, None] * stride_kt + o_k[None, :]
    b_A = tl.zeros([C, C], tl.float32)
    b_sum = tl.zeros([C], tl.float32)
    for i_k in range(0, K, BK):
        mask = m_c[:, None] & columns(i_k + o_k, K, BK)[None, :]
        b_k = tl.load(p_k + i_k, mask=mask, other=0.0)
        b_A += dot(b_k, tl.trans(b_k), DTYPE)
        if L2NORM and not GIVEN:
            b_wide = b_k.to(tl.float32)
            b_sum += tl.sum(b_wide * b_wide, 1)
    if L2NORM:
        p_r = (i_c * H + i_hk) * C + o_c
        if GIVEN:
            b_rk = tl.load(rk + p_r)
        else:
            b_rk = tl.rsqrt(b_sum + eps)
        b_A *= b_rk[:, None] * b_rk[None, :]
        if not GIVEN and i_h % (HV // H) == 0:
            tl.store(rk + p_r, b_rk)
            p_q = q + i_b * stride_qb + i_t * stride_qt + i_hk * stride_qh + o_c[:, None] * stride_qt + o_k[None, :]
            tl.store(rq + p_r, row_factors(p_q, m_c, o_k, eps, C, K, BK))

    p_beta = beta + i_b * stride_bb + i_t * stride_bt + i_h * stride_bh
    b_beta = tl.load(p_beta + o_c * stride_bt, mask=m_c, other=0.0).to(tl.float32)
    m_lower = (o_c[:, None] > o_c[None, :]) & m_c[:, None] & m_c[None, :]
    b_A *= b_beta[:, None] * tl.exp2(tl.where(m_lower, b_G[:, None] - b_G[None, :], float("-inf")))
    store(T + i * C * C + o_c[:, None] * C + o_c[None, :], inverse(b_A, PRECISION))


def prepare(
    q: Tensor,
    k: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    table: ChunkTable,
    l2norm_eps: float | None,
    negative_eigenvalues: bool,
    norms: tuple[Tensor, Tensor] | None = None,
) -> Prepared:
    """Gates, factors of the norm and T of all chunks.

    Args:
        q, k: `[B, T, H, K]` float32, float16 or bfloat16, any strides but 1 for K.
        g, beta: `[B, T, HV]`, any float dtype and strides; g natural log.
        table: of the batch.
        l2norm_eps: added to the sums of squares of q and k; None: they are used as they are.
        negative_eigenvalues: beta may exceed 1; the blocks of T are joined with more digits.
        norms: rq and rk of `Prepared`, where an earlier kernel has them; None: they are computed where there is an eps.
    """
    num_chunks, HV, (_, num_tokens, H, K) = table.num_chunks, g.shape[2], k.shape
    G = g.new_empty(num_chunks, HV, CHUNK_SIZE, dtype=torch.float32)
    T = k.new_empty(num_chunks, HV, CHUNK_SIZE, CHUNK_SIZE)
    rq, rk = norms or (None, None)
    if l2norm_eps is not None and norms is None:
        rq, rk = (k.new_empty(num_chunks, H, CHUNK_SIZE, dtype=torch.float32) for _ in range(2))
    precise = negative_eigenvalues or k.dtype == torch.float32
    prepare_kernel[(num_chunks * HV,)](
        q,
        k,
        g,
        beta,
        G,
        T,
        rq,
        rk,
        table.chunk_bounds,
        num_tokens,
        0.0 if l2norm_eps is None else l2norm_eps,
        *q.stride()[:3],
        *k.stride()[:3],
        *g.stride(),
        *beta.stride(),
        H=H,
        HV=HV,
        K=K,
        C=CHUNK_SIZE,
        L2NORM=l2norm_eps is not None,
        GIVEN=norms is not None,
        PRECISION="tf32x3" if precise else "tf32",
        **config(config_name("prepare", k.dtype), architecture(k.device), K).launch,
    )
    return Prepared(G=G, T=T, rq=rq, rk=rk)


# (K, V, dtype, whether the default), what is compiled for the report.
SHIPPED = (
    (128, 128, "bf16", True),
    (64, 64, "bf16", False),
    (192, 384, "bf16", False),
    (256, 512, "bf16", False),
    (128, 128, "fp16", False),
    (128, 128, "fp32", False),
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compile_cases(arch: str) -> list[Case]:
    """The kernel at the shapes that are shipped; at the first also with negative eigenvalues, and with norms given."""
    cases = []
    for K, _, dtype, first in SHIPPED:
        pointer = f"*{dtype}"
        signature = dict(q=pointer, k=pointer, g="*fp32", beta="*fp32", G="*fp32", T=pointer, rq="*fp32", rk="*fp32")
        signature |= dict(chunk_bounds="*i32", num_tokens="i32", eps="fp32") | strides("q", "k", "g", "b")
        plain = dict(L2NORM=True, GIVEN=False, PRECISION="tf32x3" if dtype == "fp32" else "tf32")
        variants = {"": plain}
        if first:
            variants |= {
                ", negative eigenvalues": plain | dict(PRECISION="tf32x3"),
                ", norms given": plain | dict(GIVEN=True),
            }
        for what, options in variants.items():
            cases.append(
                Case(
                    name=f"prepare K {K} {dtype}{what}",
                    kernel=prepare_kernel,
                    signature=signature,
                    constexprs=dict(H=16, HV=32, K=K, C=CHUNK_SIZE) | options,
                    config=config(config_name("prepare", DTYPES[dtype]), arch, K),
                    # Also in float32: no program of this kernel may spill at K = 128.
                    default=K == 128,
                )
            )
    return cases
