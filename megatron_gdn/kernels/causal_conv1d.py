"""Causal depthwise convolution over time, with SiLU.

    z_t = bias + sum_{j < W} w_j x_{t-W+1+j}        y = z sigmoid(z)
    dz = dy silu'(z)        dx_t = sum_j w_j dz_{t+W-1-j}        dw_j = sum_t dz_t x_{t-W+1+j}        dbias = sum_t dz_t

Before the first token of a sequence lie W - 1 rows of zeros, or of its initial state. The backward pass recomputes z.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megatron_gdn.kernels.backend import accumulate_dtype, check_floats, check_triton_dtypes, resolve_backend
from megatron_gdn.kernels.varlen import ChunkTable, table_of_batch

ACTIVATIONS = ("silu", None)
# Elements that the passes over a stretch of time share: 0.5 MiB in float32 for a CPU's cache. A GPU takes all at once.
_STRETCH_ELEMENTS = {"cpu": 2**17, "cuda": 2**62}


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sequence by sequence in plain torch; arguments as `causal_conv1d`; always the final state."""
    width, dtype = weight.shape[1], accumulate_dtype(x.dtype)
    bounds = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, finals = [], []
    for n, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        before = x.new_zeros(x.shape[0], width - 1, x.shape[2])
        if initial_state is not None:
            before = initial_state if cu_seqlens is None else initial_state[n : n + 1]
        padded = torch.cat([before.to(dtype), x[:, start:end].to(dtype)], 1)
        finals.append(padded[:, padded.shape[1] - width + 1 :])
        if start == end:
            continue
        z = F.conv1d(padded.transpose(1, 2), weight.to(dtype).unsqueeze(1), groups=x.shape[2])
        z = z.transpose(1, 2) if bias is None else z.transpose(1, 2) + bias.to(dtype)
        outputs.append(F.silu(z) if activation == "silu" else z)
    return torch.cat([x[:, :0].to(dtype), *outputs], 1).to(x.dtype), torch.cat(finals).to(x.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """Where state and tokens lie when each sequence has its W - 1 rows of state in front.

    state, token: `[N, W - 1]` and `[T]` int64, rows of one packed batch; None: B sequences, state first, then tokens.
    """

    before: int
    state: Tensor | None = None
    token: Tensor | None = None

    @classmethod
    def of_table(cls, table: ChunkTable, before: int) -> "_Rows":
        device, N = table.bounds.device, len(table.lengths)
        first = table.bounds[:-1] + torch.arange(N, device=device) * before
        token = torch.arange(table.num_tokens, device=device) + (table.document_of_tokens() + 1) * before
        return cls(before=before, state=first[:, None] + torch.arange(before, device=device), token=token)

    def join(self, state: Tensor | None, x: Tensor) -> Tensor:
        """`[N, W - 1, D]` (None: zeros) and `[B, T, D]` to rows `[B, R, D]`."""
        if self.token is None:
            state = x.new_zeros(x.shape[0], self.before, x.shape[2]) if state is None else state.to(x.dtype)
            return torch.cat([state, x], 1)
        rows = x.new_zeros(1, self.token.numel() + self.state.numel(), x.shape[2])
        rows[0].index_copy_(0, self.token, x[0])
        if state is not None:
            rows[0].index_copy_(0, self.state.flatten(), state.to(x.dtype).flatten(0, 1))
        return rows

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `join`: state `[N, W - 1, D]` and tokens `[B, T, D]`, views or copies."""
        if self.token is None:
            return rows[:, : self.before], rows[:, self.before :]
        return rows[0][self.state], rows.index_select(1, self.token)

    def pick_outputs(self, y: Tensor) -> Tensor:
        """Outputs of tokens, `[B, T, D]`, from those of all rows but the first W - 1."""
        return y if self.token is None else y.index_select(1, self.token - self.before)

    def spread_outputs(self, dy: Tensor) -> Tensor:
        """The inverse of `pick_outputs`: 0 where a row is no token."""
        if self.token is None:
            return dy
        num_outputs = self.token.numel() + self.state.numel() - self.before
        return dy.new_zeros(1, num_outputs, dy.shape[2]).index_copy_(1, self.token - self.before, dy)

    def final_state(self, rows: Tensor, table: ChunkTable) -> Tensor:
        """The last W - 1 rows of each sequence, `[N, W - 1, D]`, new memory."""
        if self.token is None:
            return rows[:, rows.shape[1] - self.before :].clone()
        return rows[0][self.state + table.bounds.diff()[:, None]]


class _CausalConv1d(torch.autograd.Function):
    """Works on rows in which every sequence is preceded by its state. Saves only the inputs."""

    @staticmethod
    def forward(ctx, x, weight, bias, initial_state, activation, layout: _Rows):
        ctx.save_for_backward(x, weight, bias, initial_state)
        ctx.activation, ctx.layout = activation, layout
        rows, dtype = layout.join(initial_state, x), accumulate_dtype(x.dtype)
        taps, bias = _taps(weight, bias, dtype)
        y = rows.new_empty(rows.shape[0], rows.shape[1] - layout.before, rows.shape[2])
        for part in _stretches(y):
            z = _correlate(rows, part, taps, bias)
            y[:, part] = z.mul_(z.sigmoid()) if activation == "silu" else z
        return layout.pick_outputs(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, initial_state = ctx.saved_tensors
        layout, dtype = ctx.layout, accumulate_dtype(x.dtype)
        rows, dy = layout.join(initial_state, x), layout.spread_outputs(dy)
        taps, wide_bias = _taps(weight, bias, dtype)
        drows = torch.zeros_like(rows, dtype=dtype)
        dtaps = torch.zeros_like(taps)
        dbias = torch.zeros_like(taps[0])
        for part in _stretches(dy):
            dz = dy[:, part].to(dtype)
            if ctx.activation == "silu":
                z = _correlate(rows, part, taps, wide_bias)
                s = z.sigmoid()
                # silu'(z) = s (1 + z (1 - s))
                dz = z.mul_(1 - s).add_(1).mul_(s).mul_(dz)
            for j, tap in enumerate(taps):
                seen = slice(part.start + j, part.stop + j)
                drows[:, seen].addcmul_(dz, tap)
                dtaps[j] += (dz * rows[:, seen]).sum((0, 1))
            dbias += dz.sum((0, 1))
        dstate, dx = layout.split(drows)
        dstate = dstate.to(initial_state.dtype) if ctx.needs_input_grad[3] else None
        dbias = dbias.to(bias.dtype) if ctx.needs_input_grad[2] else None
        return dx.to(x.dtype), dtaps.t().to(weight.dtype), dbias, dstate, None, None


def _taps(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """weight by position in time, `[W, D]`, and bias, in the dtype of the arithmetic."""
    return weight.t().to(dtype, memory_format=torch.contiguous_format), None if bias is None else bias.to(dtype)


def _stretches(y: Tensor) -> Iterator[slice]:
    """Stretches of time of `[B, R, D]`."""
    elements = _STRETCH_ELEMENTS["cpu" if y.device.type == "cpu" else "cuda"]
    size = max(1, elements // (y.shape[0] * y.shape[2]))
    return (slice(start, min(start + size, y.shape[1])) for start in range(0, y.shape[1], size))


def _correlate(rows: Tensor, part: slice, taps: Tensor, bias: Tensor | None) -> Tensor:
    """z of a stretch of outputs, new memory: output t sees rows t to t + W - 1."""
    z = rows[:, part] * taps[0]
    for j in range(1, len(taps)):
        z.addcmul_(rows[:, part.start + j : part.stop + j], taps[j])
    return z if bias is None else z.add_(bias)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | ChunkTable | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Causal depthwise convolution of width W over time, then the activation.

    Args:
        x: `[B, T, D]`, any float dtype and strides; float32 inside, float64 stays float64. The Triton backend takes no
            float64, and reads slices of a wider projection in place.
        weight: `[D, W]`; the last column meets the present token. The Triton backend takes W up to 4.
        bias: `[D]` or None.
        activation: "silu" or None.
        initial_state: `[N, W - 1, D]`, the rows before each sequence, N = B or the number of packed documents; None
            for zeros.
        output_final_state: return the last W - 1 rows of each sequence.
        cu_seqlens: `[N + 1]` int32 or int64, bounds of documents packed in B = 1, or their table from
            `prepare_chunk_table`; the convolution restarts at each document.
        backend: see `megatron_gdn.kernels.backend`.

    Returns:
        `[B, T, D]` in x's dtype, and `[N, W - 1, D]` or None.

    Raises:
        ValueError: shapes, dtypes or devices that do not match or that the backend cannot take, bad bounds, an unknown
            activation or backend.
    """
    backend = resolve_backend(backend, x.device)
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] < 2:
        raise ValueError(
            f"weight ({list(weight.shape)}) must be [D, W] with W >= 2 for x [B, T, D] ({list(x.shape)}): squeeze the "
            "middle dimension of a Conv1d weight."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias ({list(bias.shape)}) must be [D] = [{weight.shape[0]}]: one per channel.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation ({activation}) must be 'silu' or None: apply another one yourself.")
    check_floats(x=x, weight=weight, bias=bias, initial_state=initial_state)
    table = None if cu_seqlens is None else table_of_batch(x, cu_seqlens)
    before = weight.shape[1] - 1
    expected = (x.shape[0] if table is None else len(table.lengths), before, x.shape[2])
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(
            f"initial_state ({list(initial_state.shape)}) must be [N, W - 1, D] = {list(expected)}: the rows before "
            "each sequence or packed document."
        )
    if backend == "triton":
        check_width(weight)
        check_triton_dtypes(x=x, weight=weight, bias=bias, initial_state=initial_state)
        from megatron_gdn.kernels.causal_conv1d_triton import CausalConv1dTriton

        return CausalConv1dTriton.apply(x, weight, bias, initial_state, table, activation, output_final_state)
    layout = _Rows(before=before) if table is None else _Rows.of_table(table, before)
    y = _CausalConv1d.apply(x, weight, bias, initial_state, activation, layout)
    if not output_final_state:
        return y, None
    return y, layout.final_state(layout.join(initial_state, x), table)


def causal_conv1d_update_ref(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = "silu"
) -> tuple[Tensor, Tensor]:
    """One token in plain torch; arguments as `causal_conv1d_update`; y and the state after it, new memory."""
    dtype = accumulate_dtype(x.dtype)
    rows = torch.cat([state.to(dtype), x.to(dtype)[:, None]], 1)
    z = (rows * weight.to(dtype).t()).sum(1)
    z = z if bias is None else z + bias.to(dtype)
    return (F.silu(z) if activation == "silu" else z).to(x.dtype), rows[:, 1:].to(state.dtype)


def causal_conv1d_update(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    backend: str = "auto",
) -> Tensor:
    """One step of `causal_conv1d`, for decoding: a token per sequence, the state moves on in place. No gradients.

    Args:
        x: `[N, D]`, any float dtype and strides; float32 inside, float64 stays float64.
        state: `[N, W - 1, D]`, the rows before each token, any float dtype; becomes the rows before the next one.
        weight: `[D, W]`; the last column meets the present token. The Triton backend takes W up to 4.
        bias: `[D]` or None.
        activation: "silu" or None.
        backend: see `megatron_gdn.kernels.backend`.

    Returns:
        `[N, D]` in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not match or that the backend cannot take, a tensor that requires
            gradients, an unknown activation or backend.
    """
    backend = resolve_backend(backend, x.device)
    if x.dim() != 2 or weight.dim() != 2 or weight.shape[0] != x.shape[1] or weight.shape[1] < 2:
        raise ValueError(f"weight ({list(weight.shape)}) must be [D, W] with W >= 2 for x [N, D] ({list(x.shape)}).")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias ({list(bias.shape)}) must be [D] = [{weight.shape[0]}]: one per channel.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation ({activation}) must be 'silu' or None: apply another one yourself.")
    check_floats(x=x, state=state, weight=weight, bias=bias)
    expected = (x.shape[0], weight.shape[1] - 1, x.shape[1])
    if state.shape != expected:
        raise ValueError(
            f"state ({list(state.shape)}) must be [N, W - 1, D] = {list(expected)}: the rows before each token."
        )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, state, weight, bias)):
        raise ValueError("causal_conv1d_update has no gradients and an input requires them: use torch.no_grad().")
    if backend == "triton":
        check_width(weight)
        check_triton_dtypes(x=x, state=state, weight=weight, bias=bias)
        if state.stride(2) != 1 and state.shape[2] > 1:
            raise ValueError(
                f"state (strides {state.stride()}) must have contiguous channels for backend triton: allocate it as "
                "[N, W - 1, D]."
            )
        from megatron_gdn.kernels.causal_conv1d_states_triton import update

        return update(x, state, weight, bias, activation)
    y, after = causal_conv1d_update_ref(x, state, weight, bias, activation=activation)
    state.copy_(after)
    return y


def check_width(weight: Tensor) -> None:
    """Raise ValueError for a width that the Triton kernels do not have."""
    if weight.shape[1] > 4:
        raise ValueError(f"width ({weight.shape[1]}) must be 2, 3 or 4 for backend triton: use backend 'torch'.")
