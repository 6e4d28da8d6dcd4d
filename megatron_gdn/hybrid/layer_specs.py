"""ModuleSpecs of each layer of a pattern, for Megatron's `TransformerBlock`."""

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_gdn.attention import attention_spec
from megatron_gdn.config import ModelConfig
from megatron_gdn.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron_gdn.hybrid.pattern import Layer, parse_pattern
from megatron_gdn.mamba2 import Mamba2, Mamba2Submodules
from megatron_gdn.norms import RMSNorm, ZeroCenteredRMSNorm


def gated_delta_net_spec(**options) -> ModuleSpec:
    """Spec of the mixer, usable as `self_attention` of a TransformerLayer.

    Args:
        options: keyword arguments of `GatedDeltaNet` after `pg_collection`, such as `allow_neg_eigval`.
    """
    return ModuleSpec(
        module=GatedDeltaNet,
        params=options,
        submodules=GatedDeltaNetSubmodules(
            in_proj=ColumnParallelLinear, in_proj_ba=ColumnParallelLinear, out_proj=RowParallelLinear
        ),
    )


def mamba2_spec(**options) -> ModuleSpec:
    """Spec of the mixer, usable as `self_attention` of a TransformerLayer.

    Args:
        options: keyword arguments of `Mamba2` after `pg_collection`.
    """
    return ModuleSpec(
        module=Mamba2,
        params=options,
        submodules=Mamba2Submodules(
            in_proj=ColumnParallelLinear, in_proj_dt=ColumnParallelLinear, out_proj=RowParallelLinear
        ),
    )


def mixer_spec(symbol: str, model: ModelConfig) -> ModuleSpec:
    """Spec of a pattern's mixer, usable as `self_attention` of a TransformerLayer.

    Args:
        symbol: a key of `megatron_gdn.hybrid.pattern.MIXERS`.
        model: section of the run's configuration.
    """
    if symbol == "G":
        return gated_delta_net_spec(
            allow_neg_eigval=model.allow_neg_eigval,
            use_output_gate=model.use_output_gate,
            use_qk_l2norm=model.use_qk_l2norm,
            use_decay=model.use_decay,
            scale_out_proj=model.initialization == "megatron",
            backend=model.kernel_backend,
        )
    if symbol == "M":
        return mamba2_spec(backend=model.kernel_backend)
    options = model.sliding_attention if symbol == "S" else model.full_attention
    return attention_spec(
        window=options.window,
        rope=options.rope,
        rotary_percent=options.rotary_percent,
        rotary_base=model.rotary_base,
        qk_norm=options.qk_norm,
        output_gate=options.output_gate,
        zero_centered_norm=options.qk_norm and model.zero_centered_norm,
        backend=model.attention_backend,
    )


def layer_spec(layer: Layer, model: ModelConfig) -> ModuleSpec:
    """Spec of one layer: norm, mixer, residual, and norm, MLP, residual where the pattern has an MLP.

    Args:
        layer: from `parse_pattern`.
        model: section of the run's configuration.
    """
    norm = _norm(model)
    mlp = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=mixer_spec(layer.symbol, model),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm if layer.mlp else IdentityOp,
            mlp=mlp if layer.mlp else IdentityOp,
            mlp_bda=get_bias_dropout_add if layer.mlp else IdentityFuncOp,
        ),
    )


def decoder_spec(
    config: TransformerConfig, model: ModelConfig, *, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Specs of the layers that this pipeline stage holds.

    Args:
        config: its `num_layers` is the number of mixers in the pattern.
        model: section of the run's configuration.
        vp_stage: virtual pipeline stage.

    Raises:
        ValueError: `config.num_layers` is not the number of mixers in the pattern.
    """
    layers = parse_pattern(model.pattern)
    if len(layers) != config.num_layers:
        raise ValueError(
            f"num_layers ({config.num_layers}) must be the number of mixers in the pattern ({len(layers)}): "
            f"set num_layers to {len(layers)}."
        )
    start = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(layer, model) for layer in layers[start : start + count]],
        layer_norm=_norm(model),
    )


def _norm(model: ModelConfig) -> type:
    return ZeroCenteredRMSNorm if model.zero_centered_norm else RMSNorm
