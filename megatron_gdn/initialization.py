"""Initial weights that depend on the seed and the parameter's name, not on the layout.

Every parameter draws its global weight on the CPU in float32 from a generator seeded by (seed, name) and keeps its
rank's part, so a model starts from the same weights at every tensor, pipeline and data parallel size and on every
device.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor

from megatron_gdn.sections import Section, pad_ghosts, take_local


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Run a block with torch's CPU generator seeded by `seed` and `name`, then restore its state."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
        yield


def master_weight(seed: int, name: str, shape: Sequence[int], init_method: Callable[[Tensor], object]) -> Tensor:
    """The global weight `name`: float32 on the CPU, filled by `init_method` in place."""
    weight = torch.empty(*shape, dtype=torch.float32, device="cpu")
    with seeded(seed, name):
        init_method(weight)
    return weight


@torch.no_grad()
def fill_sections(
    weight: Tensor,
    sections: Sequence[Section],
    *,
    seed: int,
    name: str,
    init_method: Callable[[Tensor], object],
    rank: int,
    size: int,
    dim: int = 0,
) -> None:
    """Fill a rank's fused weight in place, each section drawn under the name `<name>.<section>`; ghosts with zeros.

    Args:
        weight: `[local rows, ...]`, any dtype and device.
        sections: its sections.
        seed: seed of the model.
        name: global name of the weight.
        init_method: fills a float32 tensor in place.
        rank, size: tensor-parallel rank and size.
        dim: along which sections lie.
    """
    masters = []
    for section in sections:
        shape = [*weight.shape[:dim], section.num_rows, *weight.shape[dim + 1 :]]
        section_name = f"{name}.{section.name}" if section.name else name
        masters.append(master_weight(seed, section_name, shape, init_method))
    weight.copy_(pad_ghosts(take_local(masters, sections, rank, size, dim), weight.shape[dim], dim))


@torch.no_grad()
def fill_sharded(
    weight: Tensor, *, seed: int, name: str, init_method: Callable[[Tensor], object], dim: int, rank: int, size: int
) -> None:
    """Fill in place a rank's contiguous part, along `dim`, of the global weight `name`.

    Args:
        weight: the rank's part, any dtype and device.
        seed, name, init_method: see `master_weight`.
        dim: the sharded dimension.
        rank, size: tensor-parallel rank and size; size 1 for a replicated weight.
    """
    shape = list(weight.shape)
    shape[dim] *= size
    weight.copy_(master_weight(seed, name, shape, init_method).chunk(size, dim)[rank])


def mark_sharded(weight: Tensor, dim: int) -> None:
    """Tell Megatron that `weight` is sharded over tensor-parallel ranks along `dim`.

    Its linear layers do so while they draw their own weights, which ours never do. A weight without the mark counts as
    replicated: the gradient norm, and with it clipping, would miss every shard but the first.
    """
    if not hasattr(weight, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(weight, True, dim, 1)


def uniform_by_inputs(weight: Tensor, *, scale: float = 1.0) -> None:
    """Fill a linear layer's weight uniformly in +-scale / sqrt(inputs), as torch's Linear does; the paper's code too.

    Args:
        weight: `[outputs, inputs]`, filled in place.
        scale: factor; 1 / sqrt(2 * layers) where the layer writes to the residual stream.
    """
    bound = scale * weight.shape[1] ** -0.5
    weight.uniform_(-bound, bound)


def log_uniform_dt_bias(dt_bias: Tensor, *, dt_min: float = 1e-3, dt_max: float = 0.1) -> None:
    """Fill `dt_bias` so that softplus(dt_bias) is log-uniform in [dt_min, dt_max], as Mamba2 and the paper's code do.

    Args:
        dt_bias: any shape, filled in place.
        dt_min, dt_max: range of the step before the decay, dimensionless.
    """
    dt = torch.empty_like(dt_bias).uniform_(torch.tensor(dt_min).log().item(), torch.tensor(dt_max).log().item())
    dt = dt.exp_()
    dt_bias.copy_(dt + (-torch.expm1(-dt)).log())  # the inverse of softplus


def log_uniform_decay(A_log: Tensor, *, low: float, high: float) -> None:
    """Fill `A_log` with log(A), A ~ U(low, high); the paper's code uses U(0, 16).

    Args:
        A_log: any shape, filled in place.
        low, high: range of A.
    """
    A_log.uniform_(low, high).clamp_(min=torch.finfo(torch.float32).tiny).log_()
