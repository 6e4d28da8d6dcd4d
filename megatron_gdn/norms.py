"""RMSNorm for Megatron's local specs, and norms over heads inside the tensor-parallel region."""

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from torch import Tensor
from torch.nn import functional as F

from megatron_gdn.kernels import rms_norm_gated
from megatron_gdn.kernels.backend import accumulate_dtype


class RMSNorm(torch.nn.Module):
    """y = x / rms(x) * weight, over the last dimension, in float32 inside; usable with sequence parallelism.

    Megatron's torch norm refuses sequence parallelism. All the host needs there is the weight's mark, by which it sums
    the gradient of the tokens that each rank saw.

    Args:
        config: Megatron's TransformerConfig.
        hidden_size: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class ZeroCenteredRMSNorm(torch.nn.Module):
    """y = x / rms(x) * (1 + weight), over the last dimension, in float32 inside; usable with sequence parallelism.

    The weight starts at 0, so that weight decay pulls the scale to 1 (Qwen3-Next, and Megatron's
    `layernorm_zero_centered_gamma`). 1 + weight is float32: bfloat16 has steps of 2**-7 just above 1.

    Args:
        config: Megatron's TransformerConfig.
        hidden_size: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm_gated(x, 1 + self.weight.to(accumulate_dtype(self.weight.dtype)), eps=self.eps)


class HeadRMSNorm(torch.nn.Module):
    """RMSNorm of each q or k head, with the weight shared by all heads of all ranks; no `sequence_parallel` mark.

    Megatron sums the gradient of its own norms of q and k over the tensor-parallel group only where
    `config.qk_layernorm` is set for the whole model (0.16.1, finalize_model_grads.py); this one sums its own, as
    `GatedRMSNorm` does.

    Args:
        config: Megatron's TransformerConfig.
        hidden_size: size of one head.
        eps: added to the mean square.
        zero_centered: multiply by 1 + weight, with the weight 0 at the start.
        tp_group: tensor-parallel process group; None: Megatron's.
    """

    def __init__(
        self, config, hidden_size: int, eps: float = 1e-5, *, zero_centered: bool = False, tp_group=None, **host_kwargs
    ):
        super().__init__()
        self.eps, self.zero_centered, self.tp_group = eps, zero_centered, tp_group
        start = torch.zeros if zero_centered else torch.ones
        self.weight = torch.nn.Parameter(start(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """`x` and the result are `[..., heads, head size]`."""
        weight = copy_to_tensor_model_parallel_region(self.weight, group=self.tp_group)
        if self.zero_centered:
            weight = 1 + weight.to(accumulate_dtype(weight.dtype))
        return rms_norm_gated(x, weight, eps=self.eps)


class GatedRMSNorm(torch.nn.Module):
    """y = x / rms(x) * weight * silu(z) over one head, with the weight shared by all heads of all ranks.

    Every rank sees its own heads, so the gradient of the replicated weight is partial on each rank, with sequence
    parallelism on or off. The weight enters through `copy_to_tensor_model_parallel_region`, whose backward sums over
    the tensor-parallel group; it must therefore not carry the `sequence_parallel` mark, by which the host would sum a
    second time. Megatron-LM #7452 is the bug this avoids.

    Args:
        head_dim: V.
        eps: added to the mean square.
        tp_group: tensor-parallel process group.
        backend: kernel backend.
    """

    def __init__(self, head_dim: int, *, eps: float, tp_group, dtype: torch.dtype, backend: str = "auto"):
        super().__init__()
        self.eps, self.tp_group, self.backend = eps, tp_group, backend
        self.weight = torch.nn.Parameter(torch.ones(head_dim, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None) -> Tensor:
        """`x`, `z` and the result are `[..., V]`; without `z` there is no gate."""
        return rms_norm_gated(x, self.shared_weight(), z, eps=self.eps, backend=self.backend)

    def shared_weight(self) -> Tensor:
        """The weight as the ranks' heads see it: its gradient is summed over the tensor-parallel group."""
        return copy_to_tensor_model_parallel_region(self.weight, group=self.tp_group)
