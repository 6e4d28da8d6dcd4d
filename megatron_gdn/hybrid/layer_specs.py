"""ModuleSpecs of each layer of a pattern, for Megatron's `TransformerBlock`."""

import copy

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
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
from megatron_gdn.config import FP8Config, ModelConfig
from megatron_gdn.fp8.recipe import layer_uses_fp8, row_multiple
from megatron_gdn.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron_gdn.hybrid.pattern import Layer, parse_pattern
from megatron_gdn.mamba2 import Mamba2, Mamba2Submodules
from megatron_gdn.providers import TE_KEYS, get_provider


def gated_delta_net_spec(*, provider: str = "local", fp8: FP8Config | None = None, **options) -> ModuleSpec:
    """Spec of the mixer, usable as `self_attention` of a TransformerLayer.

    Args:
        provider, fp8: of the linear layers, see `megatron_gdn.providers`.
        options: keyword arguments of `GatedDeltaNet` after `pg_collection`, such as `allow_neg_eigval`.
    """
    modules = get_provider(provider, fp8=fp8)
    if fp8 is not None:
        options["row_multiple"] = row_multiple(fp8)
    return ModuleSpec(
        module=GatedDeltaNet,
        params=options,
        metainfo={"fuse_input_layernorm": False},
        submodules=GatedDeltaNetSubmodules(
            in_proj=modules.column, in_proj_ba=ColumnParallelLinear, out_proj=modules.row
        ),
    )


def mamba2_spec(*, provider: str = "local", fp8: FP8Config | None = None, **options) -> ModuleSpec:
    """Spec of the mixer, usable as `self_attention` of a TransformerLayer.

    Args:
        provider, fp8: of the linear layers, see `megatron_gdn.providers`.
        options: keyword arguments of `Mamba2` after `pg_collection`.
    """
    modules = get_provider(provider, fp8=fp8)
    return ModuleSpec(
        module=Mamba2,
        params=options,
        metainfo={"fuse_input_layernorm": False},
        submodules=Mamba2Submodules(in_proj=modules.column, in_proj_dt=ColumnParallelLinear, out_proj=modules.row),
    )


def mixer_spec(
    number: int,
    symbol: str,
    model: ModelConfig,
    fp8: FP8Config | None = None,
    *,
    state_exchange: str = "all_gather",
) -> ModuleSpec:
    """Spec of a layer's mixer, usable as `self_attention` of a TransformerLayer.

    Args:
        number: of the layer, from 1.
        symbol: a key of `megatron_gdn.hybrid.pattern.MIXERS`.
        model: section of the run's configuration.
        fp8: likewise, of a layer in FP8.
        state_exchange: between context-parallel ranks, "all_gather" or "scan".
    """
    if symbol == "G":
        return gated_delta_net_spec(
            provider=model.provider,
            fp8=fp8,
            allow_neg_eigval=model.allow_neg_eigval,
            use_output_gate=model.use_output_gate,
            use_qk_l2norm=model.use_qk_l2norm,
            use_decay=model.use_decay,
            scale_out_proj=model.initialization == "megatron",
            state_exchange=state_exchange,
            backend=model.kernel_backend,
        )
    if symbol == "M":
        return mamba2_spec(
            provider=model.provider, fp8=fp8, state_exchange=state_exchange, backend=model.kernel_backend
        )
    options = model.attention_options(number)
    return attention_spec(
        num_attention_heads=model.num_attention_heads,
        num_query_groups=options.num_query_groups,
        window=options.window,
        rope=options.rope,
        rotary_percent=options.rotary_percent,
        rotary_base=model.rotary_base,
        qk_norm=options.qk_norm,
        output_gate=options.output_gate,
        zero_centered_norm=options.qk_norm and model.zero_centered_norm,
        backend=model.attention_backend,
        provider=model.provider,
        fp8=fp8,
        fuse_input_norm=model.provider == "te",
    )


def layer_spec(
    number: int,
    layer: Layer,
    model: ModelConfig,
    fp8: FP8Config | None = None,
    *,
    state_exchange: str = "all_gather",
) -> ModuleSpec:
    """Spec of one layer: norm, mixer, residual, and norm, MLP, residual where the pattern has an MLP.

    Args:
        number: of the layer, from 1.
        layer: from `parse_pattern`.
        model: section of the run's configuration.
        fp8: likewise; says for each layer whether it is in FP8.
        state_exchange: between context-parallel ranks, "all_gather" or "scan".
    """
    if fp8 is not None and not layer_uses_fp8(fp8, number - 1, len(parse_pattern(model.pattern))):
        fp8 = None
    mixer = mixer_spec(number, layer.symbol, model, fp8, state_exchange=state_exchange)
    submodules = _submodules(
        mixer, mlp=layer.mlp, provider=model.provider, zero_centered_norm=model.zero_centered_norm, fp8=fp8
    )
    return ModuleSpec(module=TransformerLayer, submodules=submodules)


def _submodules(
    mixer: ModuleSpec, *, mlp: bool, provider: str, zero_centered_norm: bool, fp8: FP8Config | None = None
) -> TransformerLayerSubmodules:
    """Parts of a layer with a mixer of a provider."""
    modules = get_provider(provider, zero_centered_norm=zero_centered_norm, fp8=fp8)
    mlp_spec = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(linear_fc1=modules.norm_column or modules.column, linear_fc2=modules.row),
    )
    mlp_norm = modules.norm if modules.norm_column is None else IdentityOp
    return TransformerLayerSubmodules(
        input_layernorm=IdentityOp if mixer.metainfo["fuse_input_layernorm"] else modules.norm,
        self_attention=mixer,
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=mlp_norm if mlp else IdentityOp,
        mlp=mlp_spec if mlp else IdentityOp,
        mlp_bda=get_bias_dropout_add if mlp else IdentityFuncOp,
        sharded_state_dict_keys_map=TE_KEYS if provider == "te" else {},
    )


def decoder_spec(
    config: TransformerConfig,
    model: ModelConfig,
    *,
    fp8: FP8Config | None = None,
    state_exchange: str = "all_gather",
) -> TransformerBlockSubmodules:
    """Specs of the layers that this pipeline stage holds.

    Args:
        config: its `num_layers` is the number of mixers in the pattern.
        model, fp8: sections of the run's configuration.
        state_exchange: between context-parallel ranks, "all_gather" or "scan".

    Raises:
        ValueError: `config.num_layers` is not the number of mixers in the pattern.
    """
    layers = parse_pattern(model.pattern)
    if len(layers) != config.num_layers:
        raise ValueError(
            f"num_layers ({config.num_layers}) must be the number of mixers in the pattern ({len(layers)}): "
            f"set num_layers to {len(layers)}."
        )
    start = get_transformer_layer_offset(config)
    count = get_num_layers_to_build(config)
    return TransformerBlockSubmodules(
        layer_specs=[
            layer_spec(i + 1, layers[i], model, fp8, state_exchange=state_exchange) for i in range(start, start + count)
        ],
        layer_norm=get_provider(model.provider, zero_centered_norm=model.zero_centered_norm).norm,
    )


class PatternLayer(TransformerLayer):
    """A layer of a pattern that repeats over all layers of a model, for Megatron-LM's `--spec`.

    The host builds each of its layers from the same spec; which mixer this one has follows from its number. Everything
    else is the host's: sizes of heads (`--linear-...`, `--mamba-...`), positions, initialisation, and the provider by
    `--transformer-impl`. The window of layers S is `--window-size W-1,0`, or the paper's 2048.

    Args:
        config, layer_number, hidden_dropout, pg_collection, vp_stage: the host's.
        submodules: None; they follow from the pattern.
        pattern: see `megatron_gdn.hybrid.pattern`.
        host_kwargs: what later hosts add.

    Raises:
        ValueError: norms other than RMSNorm.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: None = None,
        layer_number: int = 1,
        hidden_dropout: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
        *,
        pattern: str,
        **host_kwargs,
    ):
        layers = parse_pattern(pattern)
        if config.normalization != "RMSNorm":
            raise ValueError(f"normalization ({config.normalization}) must be RMSNorm: add --normalization RMSNorm.")
        # Layers differ: checkpoints must keep each apart. TransformerBlock asks here; Megatron-LM has no flag for it.
        config.hetereogenous_dist_checkpoint = True
        pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        offset = get_transformer_layer_offset(config, vp_stage, pg_collection.pp.rank())
        layer = layers[(layer_number + offset - 1) % len(layers)]
        provider = "te" if config.transformer_impl == "transformer_engine" else "local"
        if layer.symbol == "G":
            mixer = gated_delta_net_spec(provider=provider)
        elif layer.symbol == "M":
            mixer = mamba2_spec(provider=provider)
        else:
            window = (config.window_size[0] + 1 if config.window_size else 2048) if layer.symbol == "S" else None
            mixer = attention_spec(
                window=window, rotary_percent=None, provider=provider, fuse_input_norm=provider == "te"
            )
        config = copy.copy(config)
        config.window_size = None  # of all layers; ours have their own
        super().__init__(
            config,
            _submodules(
                mixer, mlp=layer.mlp, provider=provider, zero_centered_norm=config.layernorm_zero_centered_gamma
            ),
            layer_number,
            hidden_dropout,
            pg_collection,
            vp_stage,
            **host_kwargs,
        )


gdn = ModuleSpec(module=PatternLayer, params={"pattern": "G-"})
"""Gated DeltaNet, for `--spec megatron_gdn.hybrid.layer_specs gdn`."""
gdn_h1 = ModuleSpec(module=PatternLayer, params={"pattern": "G-S-"})
"""H1 of the paper, likewise."""
gdn_h2 = ModuleSpec(module=PatternLayer, params={"pattern": "M-G-S-"})
"""H2 of the paper, likewise."""
