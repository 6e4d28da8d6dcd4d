"""GPTModel from a model configuration and a layout."""

import functools
import math

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from megatron_gdn import initialization as init
from megatron_gdn.attention import HybridSelfAttention
from megatron_gdn.config import FP8Config, ModelConfig, ParallelConfig
from megatron_gdn.gated_delta_net import GatedDeltaNet
from megatron_gdn.hybrid.layer_specs import decoder_spec
from megatron_gdn.hybrid.pattern import parse_pattern
from megatron_gdn.mamba2 import Mamba2
from megatron_gdn.sections import held_heads, swiglu_sections

_OWN_WEIGHTS = (GatedDeltaNet, Mamba2)
"""Mixers that draw their weights themselves."""


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, *, dtype: torch.dtype = torch.float32, **host_options
) -> TransformerConfig:
    """Megatron's configuration of a model and a layout.

    Args:
        model, parallel: sections of the run's configuration.
        dtype: dtype of parameters and activations.
        host_options: further fields of TransformerConfig.
    """
    attention = dict(num_attention_heads=parallel.tensor, kv_channels=1)  # a model without attention; the host asks
    if model.symbols & {"S", "*"}:
        groups = model.num_query_groups or model.num_attention_heads
        # The host wants numbers that the ranks divide; each layer is told its own.
        heads, groups = held_heads(model.num_attention_heads, groups, parallel.tensor)
        attention = dict(num_attention_heads=heads, num_query_groups=groups, kv_channels=model.attention_head_dim)
    num_layers = len(parse_pattern(model.pattern))
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        **attention,
        linear_num_key_heads=model.linear_num_key_heads,
        linear_num_value_heads=model.linear_num_value_heads,
        linear_key_head_dim=model.linear_key_head_dim,
        linear_value_head_dim=model.linear_value_head_dim,
        linear_conv_kernel_dim=model.linear_conv_kernel_dim,
        mamba_num_heads=model.mamba_num_heads,
        mamba_head_dim=model.mamba_head_dim,
        mamba_state_dim=model.mamba_state_dim,
        mamba_num_groups=model.mamba_num_groups,
        layernorm_epsilon=model.norm_epsilon,
        **_init_methods(model, num_layers),
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=model.zero_centered_norm,
        transformer_impl="transformer_engine" if model.provider == "te" else "local",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        # One compiled kernel that keeps its input only; on a CPU it wants a C++ compiler and seconds.
        bias_activation_fusion=torch.cuda.is_available(),
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        context_parallel_size=parallel.context,
        cp_comm_type=parallel.context_attention if parallel.context > 1 else None,
        pipeline_model_parallel_size=parallel.pipeline,
        pipeline_model_parallel_layout=_pipeline_layout(num_layers, parallel),
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # `build_model` draws the weights by name, so no layer draws its own.
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        # Layers differ, so checkpoints keep one tensor per layer.
        hetereogenous_dist_checkpoint=True,
        **host_options,
    )


def _init_methods(model: ModelConfig, num_layers: int) -> dict:
    """Fields of TransformerConfig for `model.initialization`."""
    if model.initialization == "megatron":
        return dict(init_method_std=model.init_method_std)
    return dict(
        init_method=init.uniform_by_inputs,
        output_layer_init_method=functools.partial(init.uniform_by_inputs, scale=(2 * num_layers) ** -0.5),
        embedding_init_method=functools.partial(torch.nn.init.normal_, std=0.02),
    )


def _pipeline_layout(num_layers: int, parallel: ParallelConfig) -> list[list[str]] | None:
    """Megatron's description of the stages; None where it cuts evenly by itself."""
    sizes = parallel.pipeline_layers
    if sizes is None:
        if num_layers % parallel.pipeline == 0:
            return None
        sizes = [len(range(stage, num_layers, parallel.pipeline)) for stage in range(parallel.pipeline)]
    stages = [["decoder"] * size for size in sizes]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]] if len(stages) > 1 else None


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    """Rows of the embedding: `vocab_size` rounded up to `multiple`, the same at every tensor-parallel size."""
    return math.ceil(vocab_size / multiple) * multiple


def build_model(
    config: TransformerConfig,
    model: ModelConfig,
    *,
    vocab_size: int,
    max_sequence_length: int,
    seed: int | None,
    fp8: FP8Config | None = None,
    state_exchange: str = "all_gather",
) -> GPTModel:
    """The pipeline stage of this rank, with weights that depend on the seed and not on the layout.

    Args:
        config: from `transformer_config`.
        model: section of the run's configuration.
        vocab_size: rows of the embedding, see `padded_vocab_size`.
        max_sequence_length: tokens.
        fp8: section of the run's configuration.
        seed: seed of the weights; None leaves them as they are allocated, as on the meta device.
        state_exchange: between context-parallel ranks, "all_gather" or "scan".

    Returns:
        The model on this rank's device; needs Megatron's process groups.
    """
    gpt = GPTModel(
        config,
        decoder_spec(config, model, fp8=fp8, state_exchange=state_exchange),
        vocab_size=vocab_size,
        max_sequence_length=max_sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="none",  # attention layers have their own
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    if seed is not None:
        initialize_weights(gpt, config, seed)
    return gpt


@torch.no_grad()
def initialize_weights(model: GPTModel, config: TransformerConfig, seed: int) -> None:
    """Draw every weight of a stage by its global name.

    Linear layers use `config.init_method`, those that write to the residual stream `config.output_layer_init_method`,
    the embedding `config.embedding_init_method`; norms stay as they are made. Gated DeltaNet and
    Mamba2 draw their own.

    Args:
        model: a GPTModel with layers from `layer_spec`.
        config: its configuration.
        seed: seed of the weights.

    Raises:
        AssertionError: a parameter that no rule covers.
    """
    tp_group = parallel_state.get_tensor_model_parallel_group()
    shard = dict(seed=seed, rank=tp_group.rank(), size=tp_group.size())
    in_sections = {}
    for module in model.modules():
        if isinstance(module, HybridSelfAttention) and module.has_ghosts:
            in_sections |= {id(getattr(module, name).weight): sections for name, sections in module.sections.items()}
    own = {id(param) for module in model.modules() if isinstance(module, _OWN_WEIGHTS) for param in module.parameters()}
    for name, param in _global_names(model):
        if id(param) in own or name.endswith(("norm.weight", "layer_norm_weight")):
            continue
        if name.endswith("linear_fc1.weight"):
            sections = swiglu_sections(config.ffn_hidden_size)
            init.fill_sections(param, sections, name=name, init_method=config.init_method, **shard)
            init.mark_sharded(param, 0)
            continue
        for suffix, method, dim in (
            ("word_embeddings.weight", config.embedding_init_method, 0),
            ("output_layer.weight", config.init_method, 0),
            ("linear_qkv.weight", config.init_method, 0),
            ("linear_proj.weight", config.output_layer_init_method, 1),
            ("linear_fc2.weight", config.output_layer_init_method, 1),
        ):
            if name.endswith(suffix):
                if id(param) in in_sections:
                    init.fill_sections(param, in_sections[id(param)], name=name, init_method=method, dim=dim, **shard)
                else:
                    init.fill_sharded(param, name=name, init_method=method, dim=dim, **shard)
                init.mark_sharded(param, dim)
                break
        else:
            raise AssertionError(f"no rule initialises {name}")
    for module in model.modules():
        if isinstance(module, _OWN_WEIGHTS):
            module.reset_parameters(seed)


def _global_names(model: GPTModel):
    """(name, parameter), layers numbered over all pipeline stages, the tied output named as the embedding."""
    tied = model.share_embeddings_and_output_weights
    for name, param in model.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
        if tied and parts[0] == "output_layer":
            parts = ["embedding", "word_embeddings", "weight"]
        yield ".".join(parts), param
