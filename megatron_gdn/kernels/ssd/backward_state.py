"""Gradient of the state between chunks, in reverse: the sequential part of the backward pass.

    dS' = gamma_64 dS + C^T (gamma dy)

dS is the gradient of the state that leaves a chunk, dS' that of the chunk before; it is float32 in registers and kept
in the inputs' dtype, as the states are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_gdn.kernels.ssd.prepare import DTYPES, GROUPS, HEADS, SHIPPED, Prepared
from megatron_gdn.kernels.triton_support.configs import architecture, config, config_name
from megatron_gdn.kernels.triton_support.language import dot
from megatron_gdn.kernels.triton_support.offline import Case, strides
from megatron_gdn.kernels.triton_support.sequences import locate_sequence
from megatron_gdn.kernels.triton_support.tiles import load_tile, store_tile, with_unit_stride
from megatron_gdn.kernels.varlen import CHUNK_SIZE, ChunkTable


@triton.jit(do_not_specialize=["num_tokens"])
def state_gradients_kernel(
    C,
    dy,
    G,
    dfinal,
    dS,
    dinitial,
    first_chunk,
    chunk_bounds,
    order,
    num_tokens,
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
    HAS_DFINAL: tl.constexpr,
    NEEDS_DINITIAL: tl.constexpr,
    BP: tl.constexpr,
):
    """One program per block of columns, head and sequence; the longest sequences start first."""
    DTYPE: tl.constexpr = C.dtype.element_ty
    NUM_P: tl.constexpr = (P + BP - 1) // BP
    MN: tl.constexpr = N != BN
    MP: tl.constexpr = P % BP != 0
    i = tl.program_id(0).to(tl.int64)
    i_p, i_h = i % NUM_P, i // NUM_P % HEADS
    i_n = tl.load(order + i // (NUM_P * HEADS))
    first, num_chunks, i_b, i_t, length = locate_sequence(i_n, first_chunk, chunk_bounds, num_tokens)

    o_c, o_n, o_p = tl.arange(0, ROWS), tl.arange(0, BN), i_p * BP + tl.arange(0, BP)
    C += i_b * stride_Cb + i_h // (HEADS // GROUPS) * stride_Cg
    dy += i_b * stride_yb + i_h * stride_yh
    b_dS = tl.zeros([BN, BP], tl.float32)
    if HAS_DFINAL:
        b_dS = load_tile(dfinal + (i_n * HEADS + i_h) * N * P, o_n, o_p, P, N, P, MN, MP).to(tl.float32)
    for i_back in range(0, num_chunks):
        j = num_chunks - 1 - i_back
        token, num_rows = i_t + j * ROWS, length - j * ROWS
        i_r = (first + j).to(tl.int64) * HEADS + i_h
        b_C = load_tile(C + token * stride_Ct, o_c, o_n, stride_Ct, num_rows, N, True, MN)
        b_dy = load_tile(dy + token * stride_yt, o_c, o_p, stride_yt, num_rows, P, True, MP)
        b_G, total = tl.load(G + i_r * ROWS + o_c), tl.load(G + i_r * ROWS + ROWS - 1)
        store_tile(dS + i_r * N * P, b_dS, o_n, o_p, P, N, P, MN, MP)
        b_read = b_dy.to(tl.float32) * tl.exp2(b_G)[:, None]
        b_dS = b_dS * tl.exp2(total) + dot(tl.trans(b_C), b_read, DTYPE)
    if NEEDS_DINITIAL:
        store_tile(dinitial + (i_n * HEADS + i_h) * N * P, b_dS, o_n, o_p, P, N, P, MN, MP)


def state_gradients(
    C: Tensor,
    dy: Tensor,
    prepared: Prepared,
    dfinal: Tensor | None,
    *,
    table: ChunkTable,
    needs_dinitial: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the states of all chunks.

    Args:
        C: `[batch, T, groups, N]` float32, float16 or bfloat16, any strides but 1 for N.
        dy: `[batch, T, H, P]`, gradient of y, in C's dtype.
        prepared, table: of the batch.
        dfinal: `[M, H, N, P]`, gradient of the final states, any float dtype; None: 0.
        needs_dinitial: return the gradient of the initial states.

    Returns:
        dS `[NC, H, N, P]`, gradient of the state that leaves each chunk, in C's dtype; the gradient of the initial
        states `[M, H, N, P]` in float32, or None.
    """
    num_sequences, (_, num_tokens, num_heads, P), (num_groups, N) = len(table.lengths), dy.shape, C.shape[2:]
    launch = config(config_name("ssd_state_gradients", C.dtype), architecture(C.device), N, P).launch
    dy = with_unit_stride(dy)
    dS = C.new_empty(table.num_chunks, num_heads, N, P)
    dinitial = C.new_empty(num_sequences, num_heads, N, P, dtype=torch.float32) if needs_dinitial else None
    with torch.cuda.device_of(C):
        state_gradients_kernel[(triton.cdiv(P, launch["BP"]) * num_heads * num_sequences,)](
            C,
            dy,
            prepared.G,
            None if dfinal is None else dfinal.contiguous(),
            dS,
            dinitial,
            table.first_chunk,
            table.chunk_bounds,
            table.order,
            max(num_tokens, 1),
            *C.stride()[:3],
            *dy.stride()[:3],
            HEADS=num_heads,
            GROUPS=num_groups,
            N=N,
            P=P,
            ROWS=CHUNK_SIZE,
            BN=max(16, triton.next_power_of_2(N)),
            HAS_DFINAL=dfinal is not None,
            NEEDS_DINITIAL=needs_dinitial,
            **launch,
        )
    return dS, dinitial


def compile_cases(arch: str) -> list[Case]:
    """The kernel at the shapes that are shipped, with everything on."""
    cases = []
    for N, P, dtype, default in SHIPPED:
        signature = dict(C=f"*{dtype}", dy=f"*{dtype}", G="*fp32", dfinal="*fp32", dS=f"*{dtype}", dinitial="*fp32")
        signature |= dict(first_chunk="*i32", chunk_bounds="*i32", order="*i64", num_tokens="i32")
        constexprs = dict(HEADS=HEADS, GROUPS=GROUPS, N=N, P=P, ROWS=CHUNK_SIZE, BN=triton.next_power_of_2(N))
        cases.append(
            Case(
                name=f"ssd_state_gradients {N}/{P} {dtype}",
                kernel=state_gradients_kernel,
                signature=signature | strides("C", of="btg") | strides("y"),
                constexprs=constexprs | dict(HAS_DFINAL=True, NEEDS_DINITIAL=True),
                config=config(config_name("ssd_state_gradients", DTYPES[dtype]), arch, N, P),
                default=default,
            )
        )
    return cases
