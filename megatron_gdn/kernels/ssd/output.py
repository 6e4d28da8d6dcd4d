"""Third stage of the state-space op: the output, all chunks at once.

y = gamma (C S) + W x + D x        W_ij = exp2(G_i - G_j) CB_ij dt_j for i >= j
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_gdn.kernels.ssd.prepare import DTYPES, GROUPS, HEADS, SHIPPED, Prepared
from megatron_gdn.kernels.triton_support.configs import architecture, config, config_name
from megatron_gdn.kernels.triton_support.language import dot
from megatron_gdn.kernels.triton_support.offline import Case, strides
from megatron_gdn.kernels.triton_support.tiles import load_tile, store_tile
from megatron_gdn.kernels.varlen import CHUNK_SIZE, ChunkTable


@triton.jit(do_not_specialize=["num_tokens"])
def output_kernel(
    x,
    dt,
    C,
    D,
    G,
    CB,
    S,
    y,
    chunk_bounds,
    num_tokens,
    stride_xb,
    stride_xt,
    stride_xh,
    stride_db,
    stride_dt,
    stride_dh,
    stride_Cb,
    stride_Ct,
    stride_Cg,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    SKIP: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
):
    """One program per block of columns, head and chunk."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    NUM_P: tl.constexpr = (P + BP - 1) // BP
    MN: tl.constexpr = N % BN != 0
    MP: tl.constexpr = P % BP != 0
    i = tl.program_id(0).to(tl.int64)
    i_p, i_r = i % NUM_P, i // NUM_P
    i_c, i_h = i_r // HEADS, i_r % HEADS
    i_g = i_h // (HEADS // GROUPS)
    start, end = tl.load(chunk_bounds + 2 * i_c), tl.load(chunk_bounds + 2 * i_c + 1)
    i_b, i_t = (start // num_tokens).to(tl.int64), (start % num_tokens).to(tl.int64)
    num_rows = end - start

    o_c, o_p = tl.arange(0, ROWS), i_p * BP + tl.arange(0, BP)
    x += i_b * stride_xb + i_t * stride_xt + i_h * stride_xh
    dt += i_b * stride_db + i_t * stride_dt + i_h * stride_dh
    C += i_b * stride_Cb + i_t * stride_Ct + i_g * stride_Cg
    b_y = tl.zeros([ROWS, BP], tl.float32)
    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        b_C = load_tile(C, o_c, o_n, stride_Ct, num_rows, N, True, MN)
        b_S = load_tile(S + i_r * N * P, o_n, o_p, P, N, P, MN, MP)
        b_y += dot(b_C, b_S, DTYPE)

    b_G = tl.load(G + i_r * ROWS + o_c)
    b_dt = tl.load(dt + o_c * stride_dt, mask=o_c < num_rows, other=0.0).to(tl.float32)
    m_lower = o_c[:, None] >= o_c[None, :]
    # Padded columns have dt = 0.
    b_W = tl.exp2(tl.where(m_lower, b_G[:, None] - b_G[None, :], float("-inf"))) * b_dt[None, :]
    b_W *= load_tile(CB + (i_c * GROUPS + i_g) * ROWS * ROWS, o_c, o_c, ROWS, ROWS, ROWS, False, False)
    b_x = load_tile(x, o_c, o_p, stride_xt, num_rows, P, True, MP)
    b_y = b_y * tl.exp2(b_G)[:, None] + dot(b_W, b_x, DTYPE)
    if SKIP:
        b_y += b_x.to(tl.float32) * tl.load(D + i_h).to(tl.float32)
    store_tile(y + (start.to(tl.int64) * HEADS + i_h) * P, b_y, o_c, o_p, HEADS * P, num_rows, P, True, MP)


def output(
    x: Tensor,
    dt: Tensor,
    C: Tensor,
    D: Tensor | None,
    prepared: Prepared,
    S: Tensor,
    *,
    table: ChunkTable,
) -> Tensor:
    """y `[batch, T, H, P]` in x's dtype, contiguous.

    Args:
        x: `[batch, T, H, P]` float32, float16 or bfloat16, any strides but 1 for P.
        dt: `[batch, T, H]`, any float dtype and strides.
        C: `[batch, T, groups, N]` in x's dtype, any strides but 1 for N.
        D: `[H]`, any float dtype; None for no skip.
        prepared, S: of the other stages.
        table: of the batch.
    """
    y, (_, num_tokens, num_heads, P), (num_groups, N) = x.new_empty(x.shape), x.shape, C.shape[2:]
    launch = config(config_name("ssd_output", x.dtype), architecture(x.device), N, P).launch
    with torch.cuda.device_of(x):
        output_kernel[(triton.cdiv(P, launch["BP"]) * num_heads * table.num_chunks,)](
            x,
            dt,
            C,
            None if D is None else D.contiguous(),
            prepared.G,
            prepared.CB,
            S,
            y,
            table.chunk_bounds,
            num_tokens,
            *x.stride()[:3],
            *dt.stride(),
            *C.stride()[:3],
            HEADS=num_heads,
            GROUPS=num_groups,
            N=N,
            P=P,
            ROWS=CHUNK_SIZE,
            SKIP=D is not None,
            **launch,
        )
    return y


def compile_cases(arch: str) -> list[Case]:
    """The kernel at the shapes that are shipped, with the skip."""
    cases = []
    for N, P, dtype, default in SHIPPED:
        signature = dict(x=f"*{dtype}", dt="*fp32", C=f"*{dtype}", D="*fp32", G="*fp32", CB="*fp32", S=f"*{dtype}")
        signature |= dict(y=f"*{dtype}", chunk_bounds="*i32", num_tokens="i32")
        cases.append(
            Case(
                name=f"ssd_output {N}/{P} {dtype}",
                kernel=output_kernel,
                signature=signature | strides("x", "d") | strides("C", of="btg"),
                constexprs=dict(HEADS=HEADS, GROUPS=GROUPS, N=N, P=P, ROWS=CHUNK_SIZE, SKIP=True),
                config=config(config_name("ssd_output", DTYPES[dtype]), arch, N, P),
                default=default,
            )
        )
    return cases
