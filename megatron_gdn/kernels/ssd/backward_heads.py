"""Gradients of what each head has to itself: x, dt, A and D.

Per chunk and head, with dS the gradient of the state that leaves it (kernels/README.md has the derivation):

    du = (L CB)^T dy + lambda B dS                               dx = dt du + D dy
    dg_t = reads_t + sum_{j < t} lambda_j dt_j x_j . (B dS)_j + gamma_64 <S, dS>
    ddt = x . du + A dg          dA = sum_t dt_t dg_t            dD = sum_t x_t . dy_t

g = dt A is the log-decay. Each term of its gradient is a sum of what passes token t, without differences.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_gdn.kernels.ssd.prepare import DTYPES, GROUPS, HEADS, SHIPPED, Prepared
from megatron_gdn.kernels.triton_support.configs import architecture, config, config_name
from megatron_gdn.kernels.triton_support.language import dot, store
from megatron_gdn.kernels.triton_support.offline import Case, strides
from megatron_gdn.kernels.triton_support.tiles import load_tile, store_tile, with_unit_stride
from megatron_gdn.kernels.varlen import CHUNK_SIZE, ChunkTable


@triton.jit(do_not_specialize=["num_tokens"])
def head_gradients_kernel(
    x,
    dt,
    A,
    B,
    D,
    dy,
    G,
    CB,
    S,
    dS,
    reads,
    dx,
    ddt,
    dA,
    dD,
    chunk_bounds,
    num_tokens,
    stride_xb,
    stride_xt,
    stride_xh,
    stride_db,
    stride_dt,
    stride_dh,
    stride_Bb,
    stride_Bt,
    stride_Bg,
    stride_yb,
    stride_yt,
    stride_yh,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    SKIP: tl.constexpr,
    BP: tl.constexpr,
):
    """One program per head and chunk."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    MN: tl.constexpr = N != BN
    MP: tl.constexpr = P % BP != 0
    i = tl.program_id(0).to(tl.int64)
    i_c, i_h = i // HEADS, i % HEADS
    i_g = i_h // (HEADS // GROUPS)
    start, end = tl.load(chunk_bounds + 2 * i_c), tl.load(chunk_bounds + 2 * i_c + 1)
    i_b, i_t = (start // num_tokens).to(tl.int64), (start % num_tokens).to(tl.int64)
    num_rows, i_token = end - start, start.to(tl.int64)
    o_c, o_n = tl.arange(0, ROWS), tl.arange(0, BN)
    m_c = o_c < num_rows

    x += i_b * stride_xb + i_t * stride_xt + i_h * stride_xh
    dt += i_b * stride_db + i_t * stride_dt + i_h * stride_dh
    dy += i_b * stride_yb + i_t * stride_yt + i_h * stride_yh
    B += i_b * stride_Bb + i_t * stride_Bt + i_g * stride_Bg
    b_G, total = tl.load(G + i * ROWS + o_c), tl.load(G + i * ROWS + ROWS - 1)
    b_dt = tl.load(dt + o_c * stride_dt, mask=m_c, other=0.0).to(tl.float32)
    b_lambda = tl.exp2(total - b_G)
    m_upper = o_c[:, None] <= o_c[None, :]
    b_W = tl.exp2(tl.where(m_upper, b_G[None, :] - b_G[:, None], float("-inf")))
    b_W *= tl.load(CB + (i_c * GROUPS + i_g) * ROWS * ROWS + o_c[None, :] * ROWS + o_c[:, None])
    if SKIP:
        skip = tl.load(D + i_h).to(tl.float32)
    b_ddt, b_writes = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    kept, skipped = 0.0, 0.0
    for i_p in range(0, P, BP):
        o_p = i_p + tl.arange(0, BP)
        b_S = load_tile(S + i * N * P, o_n, o_p, P, N, P, MN, MP)
        b_dS = load_tile(dS + i * N * P, o_n, o_p, P, N, P, MN, MP)
        kept += tl.sum(b_S.to(tl.float32) * b_dS.to(tl.float32))
        b_B = load_tile(B, o_c, o_n, stride_Bt, num_rows, N, True, MN)
        b_x = load_tile(x, o_c, o_p, stride_xt, num_rows, P, True, MP)
        b_dy = load_tile(dy, o_c, o_p, stride_yt, num_rows, P, True, MP)
        b_du = dot(b_B, b_dS, DTYPE) * b_lambda[:, None]
        b_writes += tl.sum(b_x.to(tl.float32) * b_du, 1)
        b_du += dot(b_W, b_dy, DTYPE)
        b_ddt += tl.sum(b_x.to(tl.float32) * b_du, 1)
        b_du *= b_dt[:, None]
        if SKIP:
            skipped += tl.sum(b_x.to(tl.float32) * b_dy.to(tl.float32))
            b_du += skip * b_dy.to(tl.float32)
        store_tile(dx + (i_token * HEADS + i_h) * P, b_du, o_c, o_p, HEADS * P, num_rows, P, True, MP)
    b_writes *= b_dt
    b_dg = tl.load(reads + i * ROWS + o_c) + tl.cumsum(b_writes, 0) - b_writes + kept * tl.exp2(total)
    b_ddt += tl.load(A + i_h).to(tl.float32) * b_dg
    store(ddt + (i_token + o_c) * HEADS + i_h, b_ddt, mask=m_c)
    tl.store(dA + i, tl.sum(b_dt * b_dg))
    if SKIP:
        tl.store(dD + i, skipped)


def head_gradients(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    D: Tensor | None,
    dy: Tensor,
    prepared: Prepared,
    S: Tensor,
    dS: Tensor,
    reads: Tensor,
    *,
    table: ChunkTable,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of x, dt, A and D.

    Args:
        x: `[batch, T, H, P]` float32, float16 or bfloat16, any strides but 1 for P.
        dt: `[batch, T, H]`, any float dtype and strides.
        A: `[H]`, any float dtype.
        B: `[batch, T, groups, N]` in x's dtype, any strides but 1 for N.
        D: `[H]`, any float dtype; None for no skip.
        dy: `[batch, T, H, P]`, gradient of y, in x's dtype.
        prepared: of the forward pass.
        S: `[NC, H, N, P]`, states that enter the chunks.
        dS: `[NC, H, N, P]`, from `state_gradients`.
        reads: `[NC, H, 64]`, from `group_gradients`.
        table: of the batch.

    Returns:
        dx, ddt, dA and dD (None without D) in the shapes and dtypes of their inputs, contiguous.
    """
    (_, num_tokens, num_heads, P), (num_groups, N) = x.shape, B.shape[2:]
    launch = config(config_name("ssd_head_gradients", x.dtype), architecture(x.device), N, P).launch
    dy = with_unit_stride(dy)
    dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
    dA, dD = (x.new_empty(table.num_chunks, num_heads, dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(x):
        head_gradients_kernel[(num_heads * table.num_chunks,)](
            x,
            dt,
            A.contiguous(),
            B,
            None if D is None else D.contiguous(),
            dy,
            prepared.G,
            prepared.CB,
            S,
            dS,
            reads,
            dx,
            ddt,
            dA,
            dD,
            table.chunk_bounds,
            num_tokens,
            *x.stride()[:3],
            *dt.stride(),
            *B.stride()[:3],
            *dy.stride()[:3],
            HEADS=num_heads,
            GROUPS=num_groups,
            N=N,
            P=P,
            ROWS=CHUNK_SIZE,
            BN=max(16, triton.next_power_of_2(N)),
            SKIP=D is not None,
            **launch,
        )
    # Sums over all chunks of numbers of both signs.
    dA = dA.sum(0, dtype=torch.float64).to(A.dtype)
    return dx, ddt, dA, None if D is None else dD.sum(0, dtype=torch.float64).to(D.dtype)


def compile_cases(arch: str) -> list[Case]:
    """The kernel at the shapes that are shipped, with the skip."""
    cases = []
    for N, P, dtype, default in SHIPPED:
        signature = {name: f"*{dtype}" for name in ("x", "B", "dy", "S", "dS", "dx")}
        signature |= {name: "*fp32" for name in ("dt", "A", "D", "G", "CB", "reads", "ddt", "dA", "dD")}
        signature |= dict(chunk_bounds="*i32", num_tokens="i32") | strides("x", "d", "y") | strides("B", of="btg")
        constexprs = dict(HEADS=HEADS, GROUPS=GROUPS, N=N, P=P, ROWS=CHUNK_SIZE, BN=triton.next_power_of_2(N))
        cases.append(
            Case(
                name=f"ssd_head_gradients {N}/{P} {dtype}",
                kernel=head_gradients_kernel,
                signature=signature,
                constexprs=constexprs | dict(SKIP=True),
                config=config(config_name("ssd_head_gradients", DTYPES[dtype]), arch, N, P),
                default=default,
            )
        )
    return cases
