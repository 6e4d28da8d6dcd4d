"""Causal depthwise convolution in Triton; formulas in causal_conv1d.py, inputs are checked there.

A program takes a chunk of 64 tokens, which lies in one document (varlen.py), and a block of channels. A thread has RUN
neighbouring tokens and shares the rows and gradients they need, which the tokens of a run read 1.75 times instead of W
times.

Bytes per token and channel of e bytes: forward 2 e, backward 3 e; in bfloat16, 4 and 6. For the 8192 channels of a
layer of 16 key and 32 value heads of 128, that is 33 kB and 49 kB per token: 11 ns and 16 ns at 3.0 TB/s. The sums of
dweight and dbias over a program's tokens go to memory in float32, 1 % of that, and torch adds them in a fixed order.
The states before and after a sequence, and decoding, are in causal_conv1d_states_triton.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_gdn.kernels.causal_conv1d_states_triton import (
    cases_of,
    channels_last,
    final_state,
    initial_state_backward,
    load_row,
    load_taps,
    silu_backward,
    table_pointers,
)
from megatron_gdn.kernels.triton_support.configs import architecture, config
from megatron_gdn.kernels.triton_support.language import store
from megatron_gdn.kernels.triton_support.offline import Case
from megatron_gdn.kernels.varlen import CHUNK_SIZE, ChunkTable

MAX_STEPS = 8
"""Chunks that a program of the backward pass sums over: 20 bytes of sums for 512 tokens of a channel."""
MIN_PROGRAMS = 1024
"""Small batches are split into at least as many programs, some for each of 132 multiprocessors, before steps grow."""


@triton.jit
def _chunk(i_c, T, p_bounds, p_chunk_bounds, p_chunk_sequence, PACKED: tl.constexpr, CHUNK: tl.constexpr):
    """Sequence of a chunk, row of the batch it is in, its first token, and the bounds of its sequence in that row."""
    if PACKED:
        n = tl.load(p_chunk_sequence + i_c)
        first = tl.load(p_chunk_bounds + 2 * i_c)
        start = tl.load(p_bounds + n).to(tl.int32)
        end = tl.load(p_bounds + n + 1).to(tl.int32)
        return n, n * 0, first, start, end
    else:
        chunks = tl.cdiv(T, CHUNK)
        n = i_c // chunks
        first = (i_c % chunks) * CHUNK
        return n, n, first, n * 0, T + n * 0


@triton.jit(do_not_specialize=["T"])
def causal_conv1d_forward_kernel(
    p_x,
    p_weight,
    p_bias,
    p_state,
    p_y,
    p_bounds,
    p_chunk_bounds,
    p_chunk_sequence,
    T,
    D,
    stride_xb,
    stride_xt,
    stride_yb,
    stride_yt,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    SILU: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_I: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program takes a chunk of tokens and BLOCK_D channels; rows before a sequence's first are its state."""
    num_blocks = tl.cdiv(D, BLOCK_D)
    i_c = tl.program_id(0) // num_blocks
    o_d = (tl.program_id(0) % num_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    n, b, first, start, end = _chunk(
        i_c, T, p_bounds, p_chunk_bounds, p_chunk_sequence, PACKED=PACKED, CHUNK=BLOCK_I * RUN
    )
    p_x += b.to(tl.int64) * stride_xb + first.to(tl.int64) * stride_xt
    p_y += b.to(tl.int64) * stride_yb + first.to(tl.int64) * stride_yt
    p_state += n.to(tl.int64) * (WIDTH - 1) * D
    start, end = start - first, end - first
    taps = load_taps(p_weight, o_d, m_d, WIDTH)
    # Tokens are counted from the chunk's first; x[i] is the row i - (W - 1) after that of a run's first token.
    token = tl.arange(0, BLOCK_I) * RUN
    x = ()
    for i in tl.static_range(RUN + WIDTH - 1):
        row = token + (i - WIDTH + 1)
        x = x + (load_row(p_x, p_state, row, start, end, stride_xt, o_d, m_d, D, WIDTH, HAS_STATE),)
    for i in tl.static_range(RUN):
        y = x[i] * taps[0][None, :]
        for j in tl.static_range(1, WIDTH):
            y += x[i + j] * taps[j][None, :]
        if HAS_BIAS:
            y += tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        if SILU:
            y = y * tl.sigmoid(y)
        mask = (token + i < end)[:, None] & m_d[None, :]
        store(p_y + (token + i)[:, None] * stride_yt + o_d[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["num_chunks", "steps", "T"])
def causal_conv1d_backward_kernel(
    p_dy,
    p_dfinal,
    p_x,
    p_weight,
    p_bias,
    p_state,
    p_dx,
    p_sums,
    p_bounds,
    p_chunk_bounds,
    p_chunk_sequence,
    num_chunks,
    steps,
    T,
    D,
    stride_dyb,
    stride_dyt,
    stride_xb,
    stride_xt,
    stride_dxb,
    stride_dxt,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_DFINAL: tl.constexpr,
    SILU: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_I: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program takes `steps` chunks; its sums of dweight, tap by tap, and dbias are p_sums[program] `[W (+ 1), D]`."""
    num_blocks = tl.cdiv(D, BLOCK_D)
    i_p = tl.program_id(0) // num_blocks
    o_d = (tl.program_id(0) % num_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    taps = load_taps(p_weight, o_d, m_d, WIDTH)
    if HAS_BIAS:
        bias = tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    NUM_SUMS: tl.constexpr = WIDTH + HAS_BIAS
    sums = ()
    for _ in tl.static_range(NUM_SUMS):
        sums = sums + (tl.zeros([BLOCK_I, BLOCK_D], tl.float32),)
    token = tl.arange(0, BLOCK_I) * RUN
    for step in range(0, tl.minimum(steps, num_chunks - i_p * steps)):
        n, b, first, start, end = _chunk(
            i_p * steps + step, T, p_bounds, p_chunk_bounds, p_chunk_sequence, PACKED=PACKED, CHUNK=BLOCK_I * RUN
        )
        p_x_chunk = p_x + b.to(tl.int64) * stride_xb + first.to(tl.int64) * stride_xt
        p_dy_chunk = p_dy + b.to(tl.int64) * stride_dyb + first.to(tl.int64) * stride_dyt
        p_dx_chunk = p_dx + b.to(tl.int64) * stride_dxb + first.to(tl.int64) * stride_dxt
        p_before = p_state + n.to(tl.int64) * (WIDTH - 1) * D
        start, end = start - first, end - first
        # x[i] is the row i - (W - 1) after that of a run's first token, dz[i] the gradient i tokens after it.
        x = ()
        for i in tl.static_range(RUN + 2 * WIDTH - 2):
            row = token + (i - WIDTH + 1)
            x = x + (load_row(p_x_chunk, p_before, row, start, end, stride_xt, o_d, m_d, D, WIDTH, HAS_STATE),)
        dz = ()
        for i in tl.static_range(RUN + WIDTH - 1):
            z = x[i] * taps[0][None, :]
            for j in tl.static_range(1, WIDTH):
                z += x[i + j] * taps[j][None, :]
            if HAS_BIAS:
                z += bias[None, :]
            dy = load_row(p_dy_chunk, p_dy_chunk, token + i, start, end, stride_dyt, o_d, m_d, D, WIDTH, False)
            dz = dz + (silu_backward(dy, z, SILU),)
            if i < RUN:
                summed = ()
                for j in tl.static_range(WIDTH):
                    summed = summed + (sums[j] + dz[i] * x[i + j],)
                if HAS_BIAS:
                    summed = summed + (sums[WIDTH] + dz[i],)
                sums = summed
        for i in tl.static_range(RUN):
            dx = dz[i] * taps[WIDTH - 1][None, :]
            for j in tl.static_range(1, WIDTH):
                dx += dz[i + j] * taps[WIDTH - 1 - j][None, :]
            if HAS_DFINAL:
                # Row of the final state that this token is.
                kept = token + i - end + (WIDTH - 1)
                mask = ((kept >= 0) & (kept < WIDTH - 1))[:, None] & m_d[None, :]
                o_kept = n.to(tl.int64) * (WIDTH - 1) * D + kept[:, None] * D + o_d[None, :]
                dx += tl.load(p_dfinal + o_kept, mask=mask, other=0.0).to(tl.float32)
            mask = (token + i < end)[:, None] & m_d[None, :]
            store(p_dx_chunk + (token + i)[:, None] * stride_dxt + o_d[None, :], dx, mask=mask)
    p_sums += i_p.to(tl.int64) * NUM_SUMS * D
    for j in tl.static_range(NUM_SUMS):
        tl.store(p_sums + j * D + o_d, tl.sum(sums[j], 0), mask=m_d)


def _num_chunks(x: Tensor, table: ChunkTable | None) -> int:
    return x.shape[0] * triton.cdiv(x.shape[1], CHUNK_SIZE) if table is None else table.num_chunks


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    table: ChunkTable | None,
    activation: str | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """y in x's dtype, contiguous, and the final state in x's dtype or None.

    Args:
        table: of packed documents; None: every row of the batch is a sequence.
    """
    (B, T, D), x = x.shape, channels_last(x)
    y, final = torch.empty(B, T, D, dtype=x.dtype, device=x.device), None
    launch = config("causal_conv1d_forward", architecture(x.device))
    if x.numel():
        with torch.cuda.device_of(x):
            causal_conv1d_forward_kernel[(_num_chunks(x, table) * triton.cdiv(D, dict(launch.block)["BLOCK_D"]),)](
                x,
                weight.contiguous(),
                x if bias is None else bias.contiguous(),
                x if initial_state is None else initial_state.contiguous(),
                y,
                *table_pointers(x, table),
                T,
                D,
                x.stride(0),
                x.stride(1),
                y.stride(0),
                y.stride(1),
                WIDTH=weight.shape[1],
                HAS_BIAS=bias is not None,
                HAS_STATE=initial_state is not None,
                SILU=activation == "silu",
                PACKED=table is not None,
                **launch.launch,
            )
    if output_final_state:
        final = final_state(x, initial_state, weight.shape[1], table)
    return y, final


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    table: ChunkTable | None,
    activation: str | None,
    *,
    dx: Tensor | None = None,
    needs_dstate: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """dx, dweight, dbias (None without bias), dinitial_state (None without), each in the dtype of its input.

    Args:
        dy, dfinal: gradients of y and of the final state; dfinal may be None.
        table: of packed documents; None: every row of the batch is a sequence.
        dx: where to write dx, such as a slice of the gradient of a wider projection: x's shape and dtype, channels
            contiguous, any other strides; None: new memory.
        needs_dstate: False: no dinitial_state.
    """
    (B, T, D), width, num_chunks = x.shape, weight.shape[1], _num_chunks(x, table)
    x, dy = channels_last(x), channels_last(dy)
    dx = torch.empty(B, T, D, dtype=x.dtype, device=x.device) if dx is None else dx
    assert dx.shape == x.shape and (D == 1 or dx.stride(-1) == 1), "dx must have x's shape and contiguous channels"
    launch = config("causal_conv1d_backward", architecture(x.device))
    blocks = triton.cdiv(D, dict(launch.block)["BLOCK_D"])
    steps = max(1, min(MAX_STEPS, num_chunks * blocks // MIN_PROGRAMS))
    programs = triton.cdiv(num_chunks, steps)
    sums = torch.empty(programs, width + (bias is not None), D, dtype=torch.float32, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            causal_conv1d_backward_kernel[(programs * blocks,)](
                dy,
                x if dfinal is None else dfinal.contiguous(),
                x,
                weight.contiguous(),
                x if bias is None else bias.contiguous(),
                x if initial_state is None else initial_state.contiguous(),
                dx,
                sums,
                *table_pointers(x, table),
                num_chunks,
                steps,
                T,
                D,
                dy.stride(0),
                dy.stride(1),
                x.stride(0),
                x.stride(1),
                dx.stride(0),
                dx.stride(1),
                WIDTH=width,
                HAS_BIAS=bias is not None,
                HAS_STATE=initial_state is not None,
                HAS_DFINAL=dfinal is not None,
                SILU=activation == "silu",
                PACKED=table is not None,
                **launch.launch,
            )
    dstate = None
    if initial_state is not None and needs_dstate:
        dstate = initial_state_backward(dy, dfinal, x, weight, bias, initial_state, table, activation)
    total = sums.sum(0)
    dbias = None if bias is None else total[width].to(bias.dtype)
    return dx, total[:width].t().to(weight.dtype), dbias, dstate


class CausalConv1dTriton(torch.autograd.Function):
    """Saves only the inputs."""

    @staticmethod
    def forward(ctx, x, weight, bias, initial_state, table, activation, output_final_state):
        ctx.save_for_backward(x, weight, bias, initial_state)
        ctx.table, ctx.activation = table, activation
        ctx.set_materialize_grads(False)
        return forward(x, weight, bias, initial_state, table, activation, output_final_state)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        x, weight, bias, initial_state = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy
        needed = ctx.needs_input_grad[3]
        grads = backward(dy, dfinal, x, weight, bias, initial_state, ctx.table, ctx.activation, needs_dstate=needed)
        return *grads, None, None, None


def compile_cases(arch: str) -> list[Case]:
    """The kernels as shipped."""
    return cases_of((causal_conv1d_forward_kernel, causal_conv1d_backward_kernel), arch)
