"""This project's own transformers model, `megatron_gdn.hf`, for what no other format holds.

Its names are those of the training model's parameters, with sections fused as in megatron_gdn/sections.py, and its
configuration is the `model` section of the run.
"""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from tools.convert.architecture import Architecture, Experts
from tools.convert.mapping import Row, Table
from tools.convert.settings import HfConfig, Settings

MODEL_TYPE = "megatron_gdn"
SETTINGS = Settings(used=("model",), only={}, without_effect=("hidden_size", "num_hidden_layers"))
_OF_THE_RUN = ("vocab_size", "vocab_multiple", "kernel_backend", "attention_backend", "provider")
"""Fields of the section that say nothing of the model, or that config.json has elsewhere."""

_ATTENTION = tuple(
    Row(f"self_attention.{name}.weight", f"self_attention.{name}.weight", transform)
    for name, transform in (
        ("linear_qkv", "same"),
        ("linear_proj", "same"),
        ("q_layernorm", "norm"),
        ("k_layernorm", "norm"),
    )
)
TABLE = Table(
    # Norms are stored as the checkpoint has them: `links` takes the model's own convention for both sides.
    norm_center=None,
    prefix="decoder.layers.{}.",
    model=(
        Row("embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        Row("decoder.final_layernorm.weight", "decoder.final_layernorm.weight", "norm"),
    ),
    output=(Row("output_layer.weight", "output_layer.weight"),),
    layer=(Row("input_layernorm.weight", "input_layernorm.weight", "norm"),),
    mlp=(
        Row("pre_mlp_layernorm.weight", "pre_mlp_layernorm.weight", "norm"),
        Row("mlp.linear_fc1.weight", "mlp.linear_fc1.weight"),
        Row("mlp.linear_fc2.weight", "mlp.linear_fc2.weight"),
    ),
    mixers={
        "G": (
            Row("self_attention.in_proj.weight.{query,key,value,z}", "self_attention.in_proj.weight", "stacked"),
            Row("self_attention.in_proj.weight.{beta,alpha}", "self_attention.in_proj_ba.weight", "stacked"),
            Row("self_attention.conv1d.weight.{query,key,value}", "self_attention.conv1d.weight", "stacked"),
            Row("self_attention.A_log", "self_attention.A_log", "float32"),
            Row("self_attention.dt_bias", "self_attention.dt_bias", "float32"),
            Row("self_attention.out_norm.weight", "self_attention.out_norm.weight", "out norm"),
            Row("self_attention.out_proj.weight", "self_attention.out_proj.weight"),
        ),
        "M": (
            Row("self_attention.in_proj.weight.{z,x,B,C}", "self_attention.in_proj.weight", "stacked"),
            Row("self_attention.in_proj.weight.dt", "self_attention.in_proj_dt.weight"),
            Row("self_attention.conv1d.weight.{x,B,C}", "self_attention.conv1d.weight", "stacked"),
            Row("self_attention.conv1d.bias.{x,B,C}", "self_attention.conv1d.bias", "stacked"),
            Row("self_attention.A_log", "self_attention.A_log", "float32"),
            Row("self_attention.dt_bias", "self_attention.dt_bias", "float32"),
            Row("self_attention.D", "self_attention.D", "float32"),
            Row("self_attention.norm.weight", "self_attention.norm.weight", "out norm"),
            Row("self_attention.out_proj.weight", "self_attention.out_proj.weight"),
        ),
        "S": _ATTENTION,
        "*": _ATTENTION,
    },
)


def table(names: Iterable[str]) -> Table:
    """There is one form of it."""
    return TABLE


def obstacles(architecture: Architecture) -> list[str]:
    """Reasons why it cannot hold a model."""
    return ["it has no experts: qwen3_next has"] if architecture.experts else []


def write_config(architecture: Architecture) -> HfConfig:
    """`config.json`, without vocabulary, dtype and special tokens."""
    model = {name: value for name, value in asdict(architecture.model).items() if name not in _OF_THE_RUN}
    return {
        "architectures": ["MegatronGDNForCausalLM"],
        "model_type": MODEL_TYPE,
        "model": model,
        "hidden_size": architecture.model.hidden_size,
        "num_hidden_layers": len(architecture.layers),
    }


def read_config(config: HfConfig) -> tuple[dict[str, Any], Experts | None]:
    """Fields of ModelConfig; there are no experts."""
    return dict(config["model"]), None
