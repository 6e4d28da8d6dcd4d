"""First stage of the state-space op: decays of every chunk and head, and C B^T of every chunk and group.

    G_i = A (dt_1 + .. + dt_i) / ln 2        CB_ij = C_i . B_j

All heads of a group use one CB, so it is computed once for them and kept in float32: each head multiplies it by decays
of its own before anything is rounded.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_gdn.kernels.triton_support.configs import architecture, config, config_name
from megatron_gdn.kernels.triton_support.language import LOG2_E, dot
from megatron_gdn.kernels.triton_support.offline import Case, strides
from megatron_gdn.kernels.triton_support.tiles import load_tile
from megatron_gdn.kernels.varlen import CHUNK_SIZE, ChunkTable

# Smallest log2 of a step's decay. What is left of a state after 2^-80 is lost beside anything written since, and sums
# of larger numbers would round away the small differences within a chunk: L is exp2 of a difference of two sums.
_SMALLEST_LOG2 = tl.constexpr(-80.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What all stages read of the decays and of B and C; NC chunks of 64 rows, padded at the end of a sequence.

    G: `[NC, H, 64]` float32, log2 of the decay since the chunk's start; padded rows repeat the last value. The sum of
        the last values of a sequence's chunks is the log2 of what it leaves of its initial state.
    CB: `[NC, groups, 64, 64]` float32, C B^T, not masked; 0 in padded rows and columns.
    """

    G: Tensor
    CB: Tensor


@triton.jit(do_not_specialize=["num_tokens"])
def prepare_kernel(
    dt,
    A,
    B,
    C,
    G,
    CB,
    chunk_bounds,
    num_tokens,
    stride_db,
    stride_dt,
    stride_dh,
    stride_Bb,
    stride_Bt,
    stride_Bg,
    stride_Cb,
    stride_Ct,
    stride_Cg,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
):
    """One program per group and chunk."""
    DTYPE: tl.constexpr = B.dtype.element_ty
    PER_GROUP: tl.constexpr = HEADS // GROUPS
    MN: tl.constexpr = N % BN != 0
    i = tl.program_id(0).to(tl.int64)
    i_c, i_g = i // GROUPS, i % GROUPS
    start, end = tl.load(chunk_bounds + 2 * i_c), tl.load(chunk_bounds + 2 * i_c + 1)
    i_b, i_t = (start // num_tokens).to(tl.int64), (start % num_tokens).to(tl.int64)
    num_rows = end - start
    o_c = tl.arange(0, ROWS)

    B += i_b * stride_Bb + i_t * stride_Bt + i_g * stride_Bg
    C += i_b * stride_Cb + i_t * stride_Ct + i_g * stride_Cg
    b_CB = tl.zeros([ROWS, ROWS], tl.float32)
    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        b_B = load_tile(B, o_c, o_n, stride_Bt, num_rows, N, True, MN)
        b_C = load_tile(C, o_c, o_n, stride_Ct, num_rows, N, True, MN)
        b_CB += dot(b_C, tl.trans(b_B), DTYPE)
    tl.store(CB + i * ROWS * ROWS + o_c[:, None] * ROWS + o_c[None, :], b_CB)

    dt += i_b * stride_db + i_t * stride_dt
    for i_r in range(0, PER_GROUP, BH):
        o_r = i_r + tl.arange(0, BH)
        m_r, o_h = o_r < PER_GROUP, i_g * PER_GROUP + o_r
        b_A = tl.load(A + o_h, mask=m_r, other=0.0).to(tl.float64)
        mask = (o_c < num_rows)[:, None] & m_r[None, :]
        b_dt = tl.load(dt + o_c[:, None] * stride_dt + o_h[None, :] * stride_dh, mask=mask, other=0.0)
        b_g = b_dt.to(tl.float32).to(tl.float64) * b_A[None, :] * LOG2_E
        b_g = tl.where(b_g < _SMALLEST_LOG2, _SMALLEST_LOG2, b_g)
        # In float64 each sum is rounded once, so that the difference of two is off by one rounding.
        b_G = tl.cumsum(b_g, 0).to(tl.float32)
        tl.store(G + (i_c * HEADS + o_h)[None, :] * ROWS + o_c[:, None], b_G, mask=m_r[None, :])


def prepare(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, table: ChunkTable) -> Prepared:
    """Decays and C B^T of all chunks.

    Args:
        dt: `[batch, T, H]`, any float dtype and strides.
        A: `[H]`, any float dtype; natural logarithm of the decay per unit of dt.
        B, C: `[batch, T, groups, N]` float32, float16 or bfloat16, any strides but 1 for N.
        table: of the batch.

    Raises:
        ValueError: N beyond the launch table.
    """
    num_chunks, HEADS, (_, num_tokens, GROUPS, N) = table.num_chunks, dt.shape[2], B.shape
    launch = config(config_name("ssd_prepare", B.dtype), architecture(B.device), N).launch
    G = dt.new_empty(num_chunks, HEADS, CHUNK_SIZE, dtype=torch.float32)
    CB = B.new_empty(num_chunks, GROUPS, CHUNK_SIZE, CHUNK_SIZE, dtype=torch.float32)
    with torch.cuda.device_of(B):
        prepare_kernel[(num_chunks * GROUPS,)](
            dt,
            A.contiguous(),
            B,
            C,
            G,
            CB,
            table.chunk_bounds,
            num_tokens,
            *dt.stride(),
            *B.stride()[:3],
            *C.stride()[:3],
            HEADS=HEADS,
            GROUPS=GROUPS,
            N=N,
            ROWS=CHUNK_SIZE,
            **launch,
        )
    return Prepared(G=G, CB=CB)


# (N, P, dtype, whether the default), what is compiled for the report: Mamba2's sizes, and larger ones.
SHIPPED = (
    (128, 64, "bf16", True),
    (64, 64, "bf16", False),
    (128, 128, "bf16", False),
    (256, 64, "bf16", False),
    (128, 64, "fp16", False),
    (128, 64, "fp32", False),
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEADS, GROUPS = 64, 1
"""Of the compiled cases: those of Mamba2 with 1.3 billion parameters."""


def compile_cases(arch: str) -> list[Case]:
    """The kernel at the shapes that are shipped."""
    cases = []
    for N, P, dtype, default in SHIPPED:
        if (N, P) == (128, 128):  # the kernel does not know P
            continue
        signature = dict(dt="*fp32", A="*fp32", B=f"*{dtype}", C=f"*{dtype}", G="*fp32", CB="*fp32")
        signature |= dict(chunk_bounds="*i32", num_tokens="i32") | strides("d") | strides("B", "C", of="btg")
        cases.append(
            Case(
                name=f"ssd_prepare N {N} {dtype}",
                kernel=prepare_kernel,
                signature=signature,
                constexprs=dict(HEADS=HEADS, GROUPS=GROUPS, N=N, ROWS=CHUNK_SIZE),
                config=config(config_name("ssd_prepare", DTYPES[dtype]), arch, N),
                default=default,
            )
        )
    return cases
