"""Gradients of B and C, which the heads of a group share, and what they leave for the gradient of the decay.

Per chunk and head, with dS the gradient of the state that leaves it (kernels/README.md has the derivation):

    Q_ij = exp2(G_i - G_j) dt_j dy_i . x_j, i >= j               the gradient of CB
    dC = Q B + gamma dy S^T                                      dB = Q^T C + lambda dt x dS^T

both summed over the heads. A program takes some heads of a group one after the other and keeps the sums of Q and of
what is read from the state in registers, then those of Q^T and of what is written to it. Where a group has more heads,
parts are added afterwards, in a fixed order. Q^T is computed as a product of its own: transposing the result of a dot
is miscompiled on Hopper (fla issue 640).

What Q and dy S^T say of the log-decay g = dt A of token t comes along, `reads`:

    sum_{i >= t > j} Q_ij CB_ij + sum_{i >= t} gamma_i C_i . (dy S^T)_i
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_gdn.kernels.ssd.prepare import DTYPES, GROUPS, HEADS, SHIPPED, Prepared
from megatron_gdn.kernels.triton_support.configs import architecture, config, config_name
from megatron_gdn.kernels.triton_support.language import dot
from megatron_gdn.kernels.triton_support.offline import Case, strides
from megatron_gdn.kernels.triton_support.tiles import load_tile, store_tile, with_unit_stride
from megatron_gdn.kernels.varlen import CHUNK_SIZE, ChunkTable


@triton.jit(do_not_specialize=["num_tokens"])
def group_gradients_kernel(
    x,
    dt,
    B,
    C,
    dy,
    G,
    CB,
    S,
    dS,
    dB,
    dC,
    reads,
    chunk_bounds,
    num_tokens,
    part,
    stride_xb,
    stride_xt,
    stride_xh,
    stride_db,
    stride_dt,
    stride_dh,
    stride_Bb,
    stride_Bt,
    stride_Bg,
    stride_Cb,
    stride_Ct,
    stride_Cg,
    stride_yb,
    stride_yt,
    stride_yh,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
    BH: tl.constexpr,
):
    """One program per BH heads of a group, group and chunk; dB and dC have a part for each block of heads."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    PER_GROUP: tl.constexpr = HEADS // GROUPS
    NUM_PARTS: tl.constexpr = (PER_GROUP + BH - 1) // BH
    MN: tl.constexpr = N != BN
    MP: tl.constexpr = P % BP != 0
    i = tl.program_id(0).to(tl.int64)
    i_part, i_cg = i % NUM_PARTS, i // NUM_PARTS
    i_c, i_g = i_cg // GROUPS, i_cg % GROUPS
    start, end = tl.load(chunk_bounds + 2 * i_c), tl.load(chunk_bounds + 2 * i_c + 1)
    i_b, i_t = (start // num_tokens).to(tl.int64), (start % num_tokens).to(tl.int64)
    num_rows = end - start
    o_c, o_n = tl.arange(0, ROWS), tl.arange(0, BN)
    m_c = o_c < num_rows
    m_lower, m_upper = o_c[:, None] >= o_c[None, :], o_c[:, None] <= o_c[None, :]

    first, num_heads = i_g * PER_GROUP + i_part * BH, tl.minimum(BH, PER_GROUP - i_part * BH)
    x += i_b * stride_xb + i_t * stride_xt + first * stride_xh
    dt += i_b * stride_db + i_t * stride_dt + first * stride_dh
    dy += i_b * stride_yb + i_t * stride_yt + first * stride_yh
    B += i_b * stride_Bb + i_t * stride_Bt + i_g * stride_Bg
    C += i_b * stride_Cb + i_t * stride_Ct + i_g * stride_Cg
    CB += i_cg * ROWS * ROWS
    o_part = i_part * part + (start.to(tl.int64) * GROUPS + i_g) * N

    b_dC, b_dCB = tl.zeros([ROWS, BN], tl.float32), tl.zeros([ROWS, ROWS], tl.float32)
    for i_r in range(0, num_heads):
        i_ch = i_c * HEADS + first + i_r
        b_read, b_Q = tl.zeros([ROWS, BN], tl.float32), tl.zeros([ROWS, ROWS], tl.float32)
        for i_p in range(0, P, BP):
            o_p = i_p + tl.arange(0, BP)
            b_dy = load_tile(dy + i_r * stride_yh, o_c, o_p, stride_yt, num_rows, P, True, MP)
            b_x = load_tile(x + i_r * stride_xh, o_c, o_p, stride_xt, num_rows, P, True, MP)
            b_S = load_tile(S + i_ch * N * P, o_n, o_p, P, N, P, MN, MP)
            b_read += dot(b_dy, tl.trans(b_S), DTYPE)
            b_Q += dot(b_dy, tl.trans(b_x), DTYPE)
        b_G = tl.load(G + i_ch * ROWS + o_c)
        b_dt = tl.load(dt + i_r * stride_dh + o_c * stride_dt, mask=m_c, other=0.0).to(tl.float32)
        b_read *= tl.exp2(b_G)[:, None]
        b_dC += b_read
        b_C = load_tile(C, o_c, o_n, stride_Ct, num_rows, N, True, MN)
        b_reads = tl.cumsum(tl.sum(b_read * b_C.to(tl.float32), 1), 0, reverse=True)
        b_Q *= tl.exp2(tl.where(m_lower, b_G[:, None] - b_G[None, :], float("-inf"))) * b_dt[None, :]
        b_dCB += b_Q
        b_Q *= load_tile(CB, o_c, o_c, ROWS, ROWS, ROWS, False, False)
        # Row t, column j: what tokens from t on read of token j.
        b_reads += tl.sum(tl.where(m_upper, 0.0, tl.cumsum(b_Q, 0, reverse=True)), 1)
        tl.store(reads + i_ch * ROWS + o_c, b_reads)
    b_B = load_tile(B, o_c, o_n, stride_Bt, num_rows, N, True, MN)
    b_dC += dot(b_dCB, b_B, DTYPE)
    store_tile(dC + o_part, b_dC, o_c, o_n, GROUPS * N, num_rows, N, True, MN)

    b_dB, b_dBC = tl.zeros([ROWS, BN], tl.float32), tl.zeros([ROWS, ROWS], tl.float32)
    for i_r in range(0, num_heads):
        i_ch = i_c * HEADS + first + i_r
        b_write, b_Q = tl.zeros([ROWS, BN], tl.float32), tl.zeros([ROWS, ROWS], tl.float32)
        for i_p in range(0, P, BP):
            o_p = i_p + tl.arange(0, BP)
            b_x = load_tile(x + i_r * stride_xh, o_c, o_p, stride_xt, num_rows, P, True, MP)
            b_dy = load_tile(dy + i_r * stride_yh, o_c, o_p, stride_yt, num_rows, P, True, MP)
            b_dS = load_tile(dS + i_ch * N * P, o_n, o_p, P, N, P, MN, MP)
            b_write += dot(b_x, tl.trans(b_dS), DTYPE)
            b_Q += dot(b_x, tl.trans(b_dy), DTYPE)
        b_G, total = tl.load(G + i_ch * ROWS + o_c), tl.load(G + i_ch * ROWS + ROWS - 1)
        b_dt = tl.load(dt + i_r * stride_dh + o_c * stride_dt, mask=m_c, other=0.0).to(tl.float32)
        b_dB += b_write * (tl.exp2(total - b_G) * b_dt)[:, None]
        b_dBC += b_Q * tl.exp2(tl.where(m_upper, b_G[None, :] - b_G[:, None], float("-inf"))) * b_dt[:, None]
    b_C = load_tile(C, o_c, o_n, stride_Ct, num_rows, N, True, MN)
    b_dB += dot(b_dBC, b_C, DTYPE)
    store_tile(dB + o_part, b_dB, o_c, o_n, GROUPS * N, num_rows, N, True, MN)


def group_gradients(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    dy: Tensor,
    prepared: Prepared,
    S: Tensor,
    dS: Tensor,
    *,
    table: ChunkTable,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of B and C.

    Args:
        x: `[batch, T, H, P]` float32, float16 or bfloat16, any strides but 1 for P.
        dt: `[batch, T, H]`, any float dtype and strides.
        B, C: `[batch, T, groups, N]` in x's dtype, any strides but 1 for N.
        dy: `[batch, T, H, P]`, gradient of y, in x's dtype.
        prepared: of the forward pass.
        S: `[NC, H, N, P]`, states that enter the chunks.
        dS: `[NC, H, N, P]`, from `state_gradients`.
        table: of the batch.

    Returns:
        dB, dC `[batch, T, groups, N]` in the dtype of B, contiguous; reads `[NC, H, 64]` float32, the part of the
        gradient of dt A that comes from what is read.
    """
    (_, num_tokens, num_heads, P), (num_groups, N) = x.shape, B.shape[2:]
    launch = config(config_name("ssd_group_gradients", x.dtype), architecture(x.device), N, P).launch
    dy = with_unit_stride(dy)
    parts = triton.cdiv(num_heads // num_groups, launch["BH"])
    dB, dC = (t.new_empty(parts, *t.shape, dtype=torch.float32 if parts > 1 else t.dtype) for t in (B, C))
    reads = x.new_empty(table.num_chunks, num_heads, CHUNK_SIZE, dtype=torch.float32)
    with torch.cuda.device_of(x):
        group_gradients_kernel[(parts * num_groups * table.num_chunks,)](
            x,
            dt,
            B,
            C,
            dy,
            prepared.G,
            prepared.CB,
            S,
            dS,
            dB,
            dC,
            reads,
            table.chunk_bounds,
            num_tokens,
            B.numel(),
            *x.stride()[:3],
            *dt.stride(),
            *B.stride()[:3],
            *C.stride()[:3],
            *dy.stride()[:3],
            HEADS=num_heads,
            GROUPS=num_groups,
            N=N,
            P=P,
            ROWS=CHUNK_SIZE,
            BN=max(16, triton.next_power_of_2(N)),
            **launch,
        )
    dB, dC = (t[0] if parts == 1 else t.sum(0).to(B.dtype) for t in (dB, dC))
    return dB, dC, reads


def compile_cases(arch: str) -> list[Case]:
    """The kernel at the shapes that are shipped."""
    cases = []
    for N, P, dtype, default in SHIPPED:
        signature = {name: f"*{dtype}" for name in ("x", "B", "C", "dy", "S", "dS")}
        signature |= {name: "*fp32" for name in ("dt", "G", "CB", "dB", "dC", "reads")}
        signature |= dict(chunk_bounds="*i32", num_tokens="i32", part="i64")
        signature |= strides("x", "d", "y") | strides("B", "C", of="btg")
        cases.append(
            Case(
                name=f"ssd_group_gradients {N}/{P} {dtype}",
                kernel=group_gradients_kernel,
                signature=signature,
                constexprs=dict(HEADS=HEADS, GROUPS=GROUPS, N=N, P=P, ROWS=CHUNK_SIZE, BN=triton.next_power_of_2(N)),
                config=config(config_name("ssd_group_gradients", DTYPES[dtype]), arch, N, P),
                default=default,
            )
        )
    return cases
