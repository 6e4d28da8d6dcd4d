"""Mamba2's state-space op in the benchmarks: its inputs and its least work."""

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.bench.shapes import Cost

HEADS, P, N = 64, 64, 128
"""Of Mamba2 with 1.3 billion parameters, which has one group."""


def inputs(generator: torch.Generator, *, T: int, heads: int, P: int, N: int, dtype: torch.dtype) -> list[Tensor]:
    """Leaves x, dt, A, B, C, D of one sequence and one group; A and dt as Mamba2 starts, D, A and dt in float32."""

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=generator.device)

    dt, A = F.softplus(normal(1, T, heads) - 4), -torch.linspace(1, 16, heads, device=generator.device)
    x, B, C = (normal(1, T, *sizes).to(dtype) for sizes in ((heads, P), (1, N), (1, N)))
    return [t.requires_grad_() for t in (x, dt, A, B, C, normal(heads))]


def least_costs(T: int, heads: int, P: int, N: int, *, rows: int = 64, size: int = 2) -> dict[str, Cost]:
    """Forward and backward: inputs and results moved once, every multiplication of chunks of `rows` tokens once.

    Forward: C B^T once for all heads, W x, C S and B^T u; backward: C B^T and its gradient twice, the states again, and
    per head Q, Q^T, (L CB)^T dy, B dS, dy S^T, x dS^T and C^T dy.
    """
    x, B, dt = size * heads * P, size * N, 4 * heads
    within, state, shared = 2 * rows * P, 2 * N * P, 2 * rows * N
    return {
        "forward": Cost(bytes=T * (2 * x + 2 * B + dt), flops=T * (heads * (within + 2 * state) + shared)),
        "backward": Cost(bytes=T * (3 * x + 4 * B + 2 * dt), flops=T * (heads * (3 * within + 5 * state) + 3 * shared)),
    }
