"""What a causal convolution keeps of its past: the last W - 1 rows, their gradient, and the step of decoding.

Also what these kernels share with those over tokens (causal_conv1d_triton.py): rows of x with the state before them.
Decoding moves 2 e + 2 (W - 1) bytes of state per channel of e bytes, 16 in bfloat16 with W = 4: 44 ns per sequence for
the 8192 channels of a layer of 16 key and 32 value heads of 128, at 3.0 TB/s.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_gdn.kernels.triton_support.configs import architecture, config
from megatron_gdn.kernels.triton_support.language import store
from megatron_gdn.kernels.triton_support.offline import Case
from megatron_gdn.kernels.varlen import ChunkTable


@triton.jit
def load_taps(p_weight, o_d, m_d, WIDTH: tl.constexpr):
    """Weight by position in time, W times `[BLOCK_D]` float32."""
    taps = ()
    for j in tl.static_range(WIDTH):
        taps = taps + (tl.load(p_weight + o_d * WIDTH + j, mask=m_d, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def load_row(p_x, p_state, row, start, end, stride, o_d, m_d, D, WIDTH: tl.constexpr, HAS_STATE: tl.constexpr):
    """x of rows `[I]`, counted as start and end are: 0 or the state before a document, 0 after. `[I, BLOCK_D]`."""
    mask = ((row >= start) & (row < end))[:, None] & m_d[None, :]
    x = tl.load(p_x + row[:, None] * stride + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_STATE:
        before = row - start + (WIDTH - 1)
        mask = ((row < start) & (before >= 0))[:, None] & m_d[None, :]
        x += tl.load(p_state + before[:, None] * D + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def silu_backward(dy, z, SILU: tl.constexpr):
    """Gradient of z from that of silu(z), or of z itself."""
    if SILU:
        s = tl.sigmoid(z)
        return dy * s * (1 + z * (1 - s))
    else:
        return dy


@triton.jit
def _sequence(n, T, p_bounds, PACKED: tl.constexpr):
    """Row of the batch that a sequence is in, its first token there, and its length."""
    if PACKED:
        start = tl.load(p_bounds + n)
        return n * 0, start, (tl.load(p_bounds + n + 1) - start).to(tl.int32)
    else:
        return n, n * 0, T + n * 0


@triton.jit(do_not_specialize=["T"])
def causal_conv1d_final_state_kernel(
    p_x,
    p_state,
    p_final,
    p_bounds,
    T,
    D,
    stride_xb,
    stride_xt,
    WIDTH: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The last W - 1 rows of a sequence, with its state before it."""
    num_blocks = tl.cdiv(D, BLOCK_D)
    n = tl.program_id(0) // num_blocks
    o_d = (tl.program_id(0) % num_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b, start, length = _sequence(n, T, p_bounds, PACKED)
    p_x += b.to(tl.int64) * stride_xb + (start.to(tl.int64) + length - (WIDTH - 1)) * stride_xt
    o_state = n.to(tl.int64) * (WIDTH - 1) * D
    for j in tl.static_range(WIDTH - 1):
        row = tl.arange(0, 1) + j
        x = load_row(
            p_x, p_state + o_state, row, WIDTH - 1 - length, WIDTH - 1, stride_xt, o_d, m_d, D, WIDTH, HAS_STATE
        )
        store(p_final + o_state + j * D + o_d[None, :], x, mask=m_d[None, :])


@triton.jit(do_not_specialize=["T"])
def causal_conv1d_initial_state_backward_kernel(
    p_dy,
    p_dfinal,
    p_x,
    p_weight,
    p_bias,
    p_state,
    p_dstate,
    p_bounds,
    T,
    D,
    stride_dyb,
    stride_dyt,
    stride_xb,
    stride_xt,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DFINAL: tl.constexpr,
    SILU: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of the W - 1 rows before a sequence, from its first W - 1 tokens and its final state."""
    num_blocks = tl.cdiv(D, BLOCK_D)
    n = tl.program_id(0) // num_blocks
    o_d = (tl.program_id(0) % num_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b, start, length = _sequence(n, T, p_bounds, PACKED)
    p_x += b.to(tl.int64) * stride_xb + start.to(tl.int64) * stride_xt
    p_dy += b.to(tl.int64) * stride_dyb + start.to(tl.int64) * stride_dyt
    o_state = n.to(tl.int64) * (WIDTH - 1) * D
    taps = load_taps(p_weight, o_d, m_d, WIDTH)
    one = tl.arange(0, 1)
    dz = ()
    for i in tl.static_range(WIDTH - 1):
        z = tl.zeros([1, BLOCK_D], tl.float32)
        for j in tl.static_range(WIDTH):
            row = one + (i + j - WIDTH + 1)
            x = load_row(p_x, p_state + o_state, row, 0, length, stride_xt, o_d, m_d, D, WIDTH, True)
            z += x * taps[j][None, :]
        if HAS_BIAS:
            z += tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        dy = load_row(p_dy, p_dy, one + i, 0, length, stride_dyt, o_d, m_d, D, WIDTH, False)
        dz = dz + (silu_backward(dy, z, SILU),)
    # Row i of the state meets tap i - j of token j.
    for i in tl.static_range(WIDTH - 1):
        dstate = dz[0] * taps[i][None, :]
        for j in tl.static_range(1, i + 1):
            dstate += dz[j] * taps[i - j][None, :]
        if HAS_DFINAL:
            # A sequence shorter than W - 1 hands rows of its state on.
            kept = one + i - length
            mask = (kept >= 0)[:, None] & m_d[None, :]
            p_kept = p_dfinal + o_state + kept[:, None] * D + o_d[None, :]
            dstate += tl.load(p_kept, mask=mask, other=0.0).to(tl.float32)
        store(p_dstate + o_state + i * D + o_d[None, :], dstate, mask=m_d[None, :])


@triton.jit
def causal_conv1d_update_kernel(
    p_x,
    p_state,
    p_weight,
    p_bias,
    p_y,
    D,
    stride_x,
    stride_sn,
    stride_sw,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token of a sequence; the state moves on by one row in place."""
    num_blocks = tl.cdiv(D, BLOCK_D)
    n = tl.program_id(0) // num_blocks
    o_d = (tl.program_id(0) % num_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    taps = load_taps(p_weight, o_d, m_d, WIDTH)
    p_state += n.to(tl.int64) * stride_sn
    x = tl.load(p_x + n.to(tl.int64) * stride_x + o_d, mask=m_d, other=0.0).to(tl.float32)
    y = x * taps[WIDTH - 1]
    for j in tl.static_range(WIDTH - 1):
        row = tl.load(p_state + j * stride_sw + o_d, mask=m_d, other=0.0).to(tl.float32)
        y += row * taps[j]
        if j > 0:
            store(p_state + (j - 1) * stride_sw + o_d, row, mask=m_d)
    store(p_state + (WIDTH - 2) * stride_sw + o_d, x, mask=m_d)
    if HAS_BIAS:
        y += tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    if SILU:
        y = y * tl.sigmoid(y)
    store(p_y + n.to(tl.int64) * D + o_d, y, mask=m_d)


def channels_last(x: Tensor) -> Tensor:
    """x `[B, T, D]` with neighbouring channels side by side, without a copy where they are."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _num_sequences(x: Tensor, table: ChunkTable | None) -> int:
    return x.shape[0] if table is None else len(table.lengths)


def table_pointers(x: Tensor, table: ChunkTable | None) -> tuple[Tensor, Tensor, Tensor]:
    """bounds, chunk_bounds, chunk_sequence; without a table, anything."""
    return (x, x, x) if table is None else (table.bounds, table.chunk_bounds, table.chunk_sequence)


def final_state(x: Tensor, initial_state: Tensor | None, width: int, table: ChunkTable | None) -> Tensor:
    """The last W - 1 rows of each sequence `[N, W - 1, D]` in x's dtype; x `[B, T, D]`, channels contiguous."""
    (_, T, D), N = x.shape, _num_sequences(x, table)
    final = x.new_empty(N, width - 1, D)
    launch = config("causal_conv1d_final_state", architecture(x.device))
    if final.numel():
        with torch.cuda.device_of(x):
            causal_conv1d_final_state_kernel[(N * triton.cdiv(D, dict(launch.block)["BLOCK_D"]),)](
                x,
                x if initial_state is None else initial_state.contiguous(),
                final,
                table_pointers(x, table)[0],
                T,
                D,
                x.stride(0),
                x.stride(1),
                WIDTH=width,
                HAS_STATE=initial_state is not None,
                PACKED=table is not None,
                **launch.launch,
            )
    return final


def initial_state_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor,
    table: ChunkTable | None,
    activation: str | None,
) -> Tensor:
    """Gradient of the initial states, `[N, W - 1, D]` in their dtype; dy and x `[B, T, D]`, channels contiguous."""
    (_, T, D), N = x.shape, _num_sequences(x, table)
    dstate = torch.empty(initial_state.shape, dtype=initial_state.dtype, device=x.device)
    launch = config("causal_conv1d_initial_state_backward", architecture(x.device))
    if dstate.numel():
        with torch.cuda.device_of(x):
            causal_conv1d_initial_state_backward_kernel[(N * triton.cdiv(D, dict(launch.block)["BLOCK_D"]),)](
                dy,
                x if dfinal is None else dfinal.contiguous(),
                x,
                weight.contiguous(),
                x if bias is None else bias.contiguous(),
                initial_state.contiguous(),
                dstate,
                table_pointers(x, table)[0],
                T,
                D,
                dy.stride(0),
                dy.stride(1),
                x.stride(0),
                x.stride(1),
                WIDTH=weight.shape[1],
                HAS_BIAS=bias is not None,
                HAS_DFINAL=dfinal is not None,
                SILU=activation == "silu",
                PACKED=table is not None,
                **launch.launch,
            )
    return dstate


def update(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """y `[N, D]`, and the state in place."""
    N, D = x.shape
    x = channels_last(x)
    y = torch.empty(N, D, dtype=x.dtype, device=x.device)
    launch = config("causal_conv1d_update", architecture(x.device))
    if x.numel():
        with torch.cuda.device_of(x):
            causal_conv1d_update_kernel[(N * triton.cdiv(D, dict(launch.block)["BLOCK_D"]),)](
                x,
                state,
                weight.contiguous(),
                x if bias is None else bias.contiguous(),
                y,
                D,
                x.stride(0),
                state.stride(0),
                state.stride(1),
                WIDTH=weight.shape[1],
                HAS_BIAS=bias is not None,
                SILU=activation == "silu",
                **launch.launch,
            )
    return y


def cases_of(kernels: tuple, arch: str) -> list[Case]:
    """Kernels of the convolution as shipped: a slice of a projection, width 4, SiLU."""
    integers = {f"stride_{x}{i}": "i32" for x in ("x", "y", "dy", "dx") for i in "bt"}
    integers |= dict(T="i32", D="i32", num_chunks="i32", steps="i32", stride_x="i32", stride_sn="i32", stride_sw="i32")
    integers |= dict(p_bounds="*i64", p_chunk_bounds="*i32", p_chunk_sequence="*i32", p_sums="*fp32")
    options = dict(WIDTH=4, HAS_BIAS=False, HAS_STATE=False, HAS_DFINAL=False, SILU=True, PACKED=True)
    everything = options | dict(HAS_BIAS=True, HAS_STATE=True, HAS_DFINAL=True)
    cases = []
    for kernel in kernels:
        name = kernel.__name__.removesuffix("_kernel")
        variants = [("bf16", "packed", options), ("bf16", "packed, bias and states", everything)]
        variants += [("bf16", "batch", options | dict(PACKED=False)), ("fp32", "packed", options)]
        variants += [("fp16", "packed", options), ("bf16", "packed, width 2", options | dict(WIDTH=2))]
        for dtype, what, constexprs in variants:
            tensors = ("x", "weight", "bias", "state", "y", "dy", "dfinal", "dx", "final", "dstate")
            used = [argument for argument in kernel.arg_names if argument in constexprs]
            cases.append(
                Case(
                    name=f"{name} {dtype} {what}",
                    kernel=kernel,
                    signature=integers | {f"p_{x}": f"*{dtype}" for x in tensors},
                    constexprs={argument: constexprs[argument] for argument in used},
                    config=config(name, arch),
                    default=(dtype, what) == ("bf16", "packed"),
                )
            )
    return cases


def compile_cases(arch: str) -> list[Case]:
    """The kernels as shipped."""
    kernels = (
        causal_conv1d_final_state_kernel,
        causal_conv1d_initial_state_backward_kernel,
        causal_conv1d_update_kernel,
    )
    return cases_of(kernels, arch)
