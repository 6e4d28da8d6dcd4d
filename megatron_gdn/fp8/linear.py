"""Tensor-parallel linear layers whose three products run on FP8 operands, without Transformer Engine.

    y = Q(x) Q(w)^T        dx = Q(dy) Q(w^T)^T        dw = Q(dy^T) Q(x^T)^T

Every product sums over the columns of both operands, along which blocks lie. What is kept for the backward pass is
Q(x^T) and Q(w^T), a byte per element. Two backends:

    emulated    operands are rounded to FP8 and multiplied in float32: the numerics of a recipe on any device
    scaled_mm   `torch._scaled_mm`: FP8 tensor cores on Hopper and later; one scale per tensor

Communication is in high precision: operands are quantised after the sequence-parallel gather and before the sum over
ranks, so that a scale belongs to what is multiplied.
"""

from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_gdn.fp8.quantize import Quantized, Quantizer
from megatron_gdn.fp8.recipe import LinearRecipe

Backend = Literal["emulated", "scaled_mm"]
_INPUT, _WEIGHT, _GRAD_OUTPUT = range(3)


def fp8_product(a: Quantized, b: Quantized, *, dtype: torch.dtype, backend: Backend) -> Tensor:
    """a b^T.

    Args:
        a: `[M, K]`.
        b: `[N, K]`.
        dtype: of the result; sums are float32.
        backend: see the module; scaled_mm wants K and N to be multiples of 16.

    Returns:
        `[M, N]`.
    """
    if backend == "emulated":
        return (a.dequantize() @ b.dequantize().t()).to(dtype)
    return torch._scaled_mm(
        a.data, b.data.t(), scale_a=a.inverse_scale.squeeze(), scale_b=b.inverse_scale.squeeze(), out_dtype=dtype
    )


class AmaxHistory:
    """Largest magnitudes of x, w and dy in the last forward passes, which set the scales of delayed scaling.

    Before the first pass the scale is 1. A pass without gradients reads the history and does not write it.

    Args:
        length: passes that count.
        device: of the layer.
    """

    def __init__(self, length: int, device: torch.device):
        self.values = torch.zeros(3, length, device=device)

    def take(self, operand: int, current: Tensor) -> Tensor:
        """The magnitude to scale by; records the current one, the largest over all ranks that share the history."""
        found = self.values[operand].max().reshape(1, 1)
        if torch.is_grad_enabled() or operand == _GRAD_OUTPUT:
            current = current.max()
            group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
            if group.size() > 1:
                torch.distributed.all_reduce(current, torch.distributed.ReduceOp.MAX, group=group)
            if operand == _INPUT:
                self.values = self.values.roll(1, dims=1)
                self.values[:, 0] = 0.0
            self.values[operand, 0] = current
        return found


def _transposed(quantizer: Quantizer, x: Tensor, straight: Quantized) -> Quantized:
    """Q(x^T); with one scale for all it is the transpose of Q(x)."""
    if quantizer.block is not None:
        return quantizer(x.t())
    return Quantized(data=straight.data.t().contiguous(), inverse_scale=straight.inverse_scale, block=None)


class _FP8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, recipe: LinearRecipe, amaxes: dict[int, Tensor], history, backend):
        rows = x.flatten(0, -2)
        x_q = recipe.input(rows, amax=amaxes.get(_INPUT))
        weight_q = recipe.weight(weight, amax=amaxes.get(_WEIGHT))
        ctx.x_t = _transposed(recipe.input, rows, x_q) if ctx.needs_input_grad[1] else None
        ctx.weight_t = _transposed(recipe.weight, weight, weight_q) if ctx.needs_input_grad[0] else None
        ctx.recipe, ctx.history, ctx.backend, ctx.dtypes = recipe, history, backend, (x.dtype, weight.dtype)
        return fp8_product(x_q, weight_q, dtype=x.dtype, backend=backend).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, dy):
        rows, recipe = dy.flatten(0, -2), ctx.recipe
        amax = None
        if ctx.history is not None:
            amax = ctx.history.take(_GRAD_OUTPUT, recipe.grad_output.amax(rows))
        dy_q = recipe.grad_output(rows, amax=amax)
        dx = dw = None
        if ctx.weight_t is not None:
            dx = fp8_product(dy_q, ctx.weight_t, dtype=ctx.dtypes[0], backend=ctx.backend).unflatten(0, dy.shape[:-1])
        if ctx.x_t is not None:
            dy_t = _transposed(recipe.grad_output, rows, dy_q)
            dw = fp8_product(dy_t, ctx.x_t, dtype=ctx.dtypes[1], backend=ctx.backend)
        return dx, dw, None, None, None, None


def fp8_linear(
    x: Tensor, weight: Tensor, recipe: LinearRecipe, *, backend: Backend, history: AmaxHistory | None = None
) -> Tensor:
    """x w^T with operands in FP8, and its gradients likewise.

    Args:
        x: `[..., I]`.
        weight: `[O, I]`.
        recipe: quantisers of the operands.
        backend: see the module.
        history: of this layer, where the recipe has one.

    Returns:
        `[..., O]` in the dtype of x.
    """
    amaxes = {}
    if history is not None:
        # x first: it moves the history on by a pass.
        amaxes[_INPUT] = history.take(_INPUT, recipe.input.amax(x.flatten(0, -2)))
        amaxes[_WEIGHT] = history.take(_WEIGHT, recipe.weight.amax(weight))
    return _FP8Linear.apply(x, weight, recipe, amaxes, history, backend)


class _FP8:
    """What makes one of Megatron's linear layers multiply in FP8; goes before it among the bases.

    Args:
        recipe: quantisers of the operands.
        backend: see the module.
        args, kwargs: the host's.
    """

    def __init__(self, *args, recipe: LinearRecipe, backend: Backend, **kwargs):
        super().__init__(*args, **kwargs)
        self.recipe, self.backend = recipe, backend
        self.history = AmaxHistory(recipe.history, self.weight.device) if recipe.history else None

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **host: Any) -> Tensor:
        if host["sequence_parallel"]:
            input = gather_from_sequence_parallel_region(input, group=host["tp_group"])
        elif host["allreduce_dgrad"]:
            input = copy_to_tensor_model_parallel_region(input, group=host["tp_group"])
        y = fp8_linear(input, weight, self.recipe, backend=self.backend, history=self.history)
        return y if bias is None else y + bias

    def get_extra_state(self) -> Tensor | None:
        """The history of magnitudes, which checkpoints keep where Transformer Engine keeps its own."""
        return None if self.history is None else self.history.values

    def set_extra_state(self, state: Any) -> None:
        """Take a history of this layer's length; anything else, such as none, leaves a fresh one."""
        if self.history is not None and isinstance(state, Tensor) and state.shape == self.history.values.shape:
            self.history.values = state.to(self.history.values.device)


class FP8ColumnParallelLinear(_FP8, ColumnParallelLinear):
    """Megatron's ColumnParallelLinear on FP8 operands."""


class FP8RowParallelLinear(_FP8, RowParallelLinear):
    """Megatron's RowParallelLinear on FP8 operands."""
