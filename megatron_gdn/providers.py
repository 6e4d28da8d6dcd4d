"""Who makes the linear layers and norms of a model: Megatron's own modules, or Transformer Engine's.

    part                                      local                                te
    norms of layers and at the end            RMSNorm, ZeroCenteredRMSNorm         TENorm
    linear layers                             ColumnParallelLinear,                TEColumnParallelLinear,
                                              RowParallelLinear                    TERowParallelLinear
    norm and first linear layer of attention  two modules                          TELayerNormColumnParallelLinear
    and MLPs
    gates: in_proj_ba, in_proj_dt             ColumnParallelLinear                 ColumnParallelLinear

With FP8 that Transformer Engine does not compute, the linear layers of `local` are those of `megatron_gdn.fp8.linear`.

Gated DeltaNet and Mamba2 have two projections of the same normed input, so their norm stays a module of its own; the
small one feeds float32 gates and never runs in FP8. With both providers a checkpoint has the keys of `local`
(`TE_KEYS`), so either reads what the other wrote.
"""

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, layers
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_gdn.config import FP8Config
from megatron_gdn.fp8.linear import FP8ColumnParallelLinear, FP8RowParallelLinear
from megatron_gdn.fp8.recipe import linear_recipe
from megatron_gdn.norms import RMSNorm, ZeroCenteredRMSNorm
from megatron_gdn.optional import require

TE_KEYS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Names inside a layer of fused norms -> their keys on disk."""


@dataclass(frozen=True, kw_only=True)
class Provider:
    """Modules that layers are built from.

    column, row: linear layers, column- and row-parallel.
    norm: RMSNorm over the hidden states.
    norm_column: that norm and a column-parallel layer in one; None: two modules.
    """

    column: ModuleSpec | type
    row: ModuleSpec | type
    norm: type
    norm_column: type | None = None


def get_provider(name: str, *, zero_centered_norm: bool = False, fp8: FP8Config | None = None) -> Provider:
    """The modules of a provider.

    Args:
        name: "local" or "te".
        zero_centered_norm: norms multiply by 1 + weight; with "te" the host's `layernorm_zero_centered_gamma` says so,
            and must be the same.
        fp8: of a layer in FP8; with "te" the host's context says which layers are.

    Raises:
        ValueError: an unknown name.
        MissingPackageError: "te" without Transformer Engine.
    """
    if name == "local":
        norm = ZeroCenteredRMSNorm if zero_centered_norm else RMSNorm
        if fp8 is None:
            return Provider(column=ColumnParallelLinear, row=RowParallelLinear, norm=norm)
        params = dict(recipe=linear_recipe(fp8), backend=fp8.backend)
        return Provider(
            column=ModuleSpec(module=FP8ColumnParallelLinear, params=params),
            row=ModuleSpec(module=FP8RowParallelLinear, params=params),
            norm=norm,
        )
    if name == "te":
        require("transformer_engine", extra="te", purpose="provider 'te'")
        from megatron.core.extensions import transformer_engine as te

        return Provider(
            column=te.TEColumnParallelLinear,
            row=te.TERowParallelLinear,
            norm=te.TENorm,
            norm_column=te.TELayerNormColumnParallelLinear,
        )
    raise ValueError(f"provider ({name}) must be 'local' or 'te': Megatron's own modules or Transformer Engine's.")


def fuses_weight_gradients(device: torch.device) -> bool:
    """Whether linear layers add weight gradients to float32 buffers inside the product.

    Apex's extension `fused_weight_gradient_mlp_cuda` does it for Megatron's modules, on CUDA only; it is used wherever
    Megatron could import it.

    Args:
        device: of this rank.
    """
    return device.type == "cuda" and layers._grad_accum_fusion_available
