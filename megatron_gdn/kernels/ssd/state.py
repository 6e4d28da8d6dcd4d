"""Second stage of the state-space op: the recurrence of the state, chunk after chunk.

    S' = gamma_64 S + B^T (lambda dt x)

gamma = exp2(G) is the decay since the chunk's start, lambda = exp2(G_64 - G) that to its end. The state is float32 in
registers; products read it rounded to the inputs' dtype, and that is what is kept of it for the other stages. Each
column of x has a state of its own, so programs share a head by columns.
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
from megatron_gdn.kernels.triton_support.tiles import load_tile, store_tile
from megatron_gdn.kernels.varlen import CHUNK_SIZE, ChunkTable


@triton.jit(do_not_specialize=["num_tokens"])
def state_kernel(
    x,
    dt,
    B,
    G,
    S,
    initial_state,
    final_state,
    first_chunk,
    chunk_bounds,
    order,
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
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
    BP: tl.constexpr,
):
    """One program per block of columns, head and sequence; the longest sequences start first."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    NUM_P: tl.constexpr = (P + BP - 1) // BP
    MN: tl.constexpr = N != BN
    MP: tl.constexpr = P % BP != 0
    i = tl.program_id(0).to(tl.int64)
    i_p, i_h = i % NUM_P, i // NUM_P % HEADS
    i_n = tl.load(order + i // (NUM_P * HEADS))
    first, num_chunks, i_b, i_t, length = locate_sequence(i_n, first_chunk, chunk_bounds, num_tokens)

    o_c, o_n, o_p = tl.arange(0, ROWS), tl.arange(0, BN), i_p * BP + tl.arange(0, BP)
    x += i_b * stride_xb + i_h * stride_xh
    dt += i_b * stride_db + i_h * stride_dh
    B += i_b * stride_Bb + i_h // (HEADS // GROUPS) * stride_Bg
    b_S = tl.zeros([BN, BP], tl.float32)
    if INITIAL:
        p_initial = initial_state + (i_n * HEADS + i_h) * N * P
        b_S = load_tile(p_initial, o_n, o_p, P, N, P, MN, MP).to(tl.float32)
    for j in range(0, num_chunks):
        token, num_rows = i_t + j * ROWS, length - j * ROWS
        i_r = (first + j).to(tl.int64) * HEADS + i_h
        b_x = load_tile(x + token * stride_xt, o_c, o_p, stride_xt, num_rows, P, True, MP)
        b_B = load_tile(B + token * stride_Bt, o_c, o_n, stride_Bt, num_rows, N, True, MN)
        b_dt = tl.load(dt + token * stride_dt + o_c * stride_dt, mask=o_c < num_rows, other=0.0).to(tl.float32)
        b_G, total = tl.load(G + i_r * ROWS + o_c), tl.load(G + i_r * ROWS + ROWS - 1)
        store_tile(S + i_r * N * P, b_S, o_n, o_p, P, N, P, MN, MP)
        # Padded rows have dt = 0.
        b_u = b_x.to(tl.float32) * (tl.exp2(total - b_G) * b_dt)[:, None]
        b_S = b_S * tl.exp2(total) + dot(tl.trans(b_B), b_u, DTYPE)
    if FINAL:
        store_tile(final_state + (i_n * HEADS + i_h) * N * P, b_S, o_n, o_p, P, N, P, MN, MP)


def states(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    prepared: Prepared,
    *,
    table: ChunkTable,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """States of all chunks.

    Args:
        x: `[batch, T, H, P]` float32, float16 or bfloat16, any strides but 1 for P.
        dt: `[batch, T, H]`, any float dtype and strides.
        B: `[batch, T, groups, N]` in x's dtype, any strides but 1 for N.
        prepared, table: of the batch.
        initial_state: `[M, H, N, P]`, any float dtype; None for zeros.
        output_final_state: return the last of them.

    Returns:
        S `[NC, H, N, P]`, the states that enter the chunks, in x's dtype; final states `[M, H, N, P]` float32, or None.

    Raises:
        ValueError: N or P beyond the launch table.
    """
    num_sequences, (_, num_tokens, num_heads, P), (num_groups, N) = len(table.lengths), x.shape, B.shape[2:]
    launch = config(config_name("ssd_state", x.dtype), architecture(x.device), N, P).launch
    S = x.new_empty(table.num_chunks, num_heads, N, P)
    final_state = x.new_empty(num_sequences, num_heads, N, P, dtype=torch.float32) if output_final_state else None
    with torch.cuda.device_of(x):
        state_kernel[(triton.cdiv(P, launch["BP"]) * num_heads * num_sequences,)](
            x,
            dt,
            B,
            prepared.G,
            S,
            None if initial_state is None else initial_state.contiguous(),
            final_state,
            table.first_chunk,
            table.chunk_bounds,
            table.order,
            max(num_tokens, 1),
            *x.stride()[:3],
            *dt.stride(),
            *B.stride()[:3],
            HEADS=num_heads,
            GROUPS=num_groups,
            N=N,
            P=P,
            ROWS=CHUNK_SIZE,
            BN=max(16, triton.next_power_of_2(N)),
            INITIAL=initial_state is not None,
            FINAL=output_final_state,
            **launch,
        )
    return S, final_state


def compile_cases(arch: str) -> list[Case]:
    """The kernel at the shapes that are shipped, with everything on."""
    cases = []
    for N, P, dtype, default in SHIPPED:
        signature = dict(x=f"*{dtype}", dt="*fp32", B=f"*{dtype}", G="*fp32", S=f"*{dtype}", initial_state="*fp32")
        signature |= dict(final_state="*fp32", first_chunk="*i32", chunk_bounds="*i32", order="*i64", num_tokens="i32")
        constexprs = dict(HEADS=HEADS, GROUPS=GROUPS, N=N, P=P, ROWS=CHUNK_SIZE, BN=triton.next_power_of_2(N))
        cases.append(
            Case(
                name=f"ssd_state {N}/{P} {dtype}",
                kernel=state_kernel,
                signature=signature | strides("x", "d") | strides("B", of="btg"),
                constexprs=constexprs | dict(INITIAL=True, FINAL=True),
                config=config(config_name("ssd_state", DTYPES[dtype]), arch, N, P),
                default=default,
            )
        )
    return cases
