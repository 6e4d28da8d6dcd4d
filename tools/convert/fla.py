"""fla's `gated_deltanet`: Gated DeltaNet, with plain or sliding-window attention."""

import math
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from megatron_gdn.config import AttentionConfig
from tools.convert.architecture import Architecture
from tools.convert.errors import ConvertError
from tools.convert.mapping import Row, Table
from tools.convert.obstacles import common_obstacles
from tools.convert.settings import HfConfig, Settings

TABLE = Table(
    norm_center=0,
    prefix="model.layers.{}.",
    model=(
        Row("embedding.word_embeddings.weight", "model.embeddings.weight"),
        Row("decoder.final_layernorm.weight", "model.norm.weight", "norm"),
    ),
    output=(Row("output_layer.weight", "lm_head.weight"),),
    layer=(Row("input_layernorm.weight", "attn_norm.weight", "norm"),),
    mlp=(
        Row("pre_mlp_layernorm.weight", "mlp_norm.weight", "norm"),
        Row("mlp.linear_fc1.weight", "mlp.{gate,up}_proj.weight", "halves"),
        Row("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
    ),
    mixers={
        "G": (
            Row("self_attention.in_proj.weight.query", "attn.q_proj.weight"),
            Row("self_attention.in_proj.weight.key", "attn.k_proj.weight"),
            Row("self_attention.in_proj.weight.value", "attn.v_proj.weight"),
            Row("self_attention.in_proj.weight.z", "attn.g_proj.weight"),
            Row("self_attention.in_proj.weight.beta", "attn.b_proj.weight"),
            Row("self_attention.in_proj.weight.alpha", "attn.a_proj.weight"),
            Row("self_attention.conv1d.weight.query", "attn.q_conv1d.weight"),
            Row("self_attention.conv1d.weight.key", "attn.k_conv1d.weight"),
            Row("self_attention.conv1d.weight.value", "attn.v_conv1d.weight"),
            Row("self_attention.A_log", "attn.A_log", "float32"),
            Row("self_attention.dt_bias", "attn.dt_bias", "float32"),
            Row("self_attention.out_norm.weight", "attn.o_norm.weight", "out norm"),
            Row("self_attention.out_proj.weight", "attn.o_proj.weight"),
        ),
        **dict.fromkeys(
            ("S", "*"),
            (
                Row("self_attention.linear_qkv.weight", "attn.{q,k,v}_proj.weight", "attention"),
                Row("self_attention.linear_proj.weight", "attn.o_proj.weight"),
            ),
        ),
    },
    ignored={"model.layers.*.attn.D": "no version of fla reads it (2024-12 to 2025-03)"},
)


def table(names: Iterable[str]) -> Table:
    """The table of a folder with these weights: before 2025-02-08 the MLP's gate and up were one weight."""
    names = set(names)
    if names and "model.layers.0.attn_norm.weight" not in names:
        raise ConvertError(
            "model.layers.0.attn_norm.weight is missing: versions of fla before 2025-02-06 could put the norms into "
            "the layers (norm_first); load the model with such a version and save it with norm_first=false."
        )
    if not names or "model.layers.0.mlp.up_proj.weight" in names:
        return TABLE
    fused = Row("mlp.linear_fc1.weight", "mlp.gate_proj.weight")
    return replace(TABLE, mlp=(TABLE.mlp[0], fused, TABLE.mlp[2]))


def obstacles(architecture: Architecture) -> list[str]:
    """Reasons why the format cannot hold a model."""
    model, found = architecture.model, common_obstacles(architecture)
    attention = architecture.attention_layers
    for differing in dict.fromkeys(_differing(options) for options in attention.values()):
        if differing:
            found.append(f"its attention has full rotary embedding, no norm of q and k, and no gate ({differing})")
    if attention and model.attention_head_dim * model.num_attention_heads != model.hidden_size:
        found.append(f"its attention heads have hidden_size / num_attention_heads channels, not {model.kv_channels}")
    if architecture.experts:
        found.append("it has no experts")
    return found


def _differing(options: AttentionConfig) -> str:
    plain = asdict(AttentionConfig(window=options.window, num_query_groups=options.num_query_groups))
    return ", ".join(f"{name} {value}" for name, value in asdict(options).items() if value != plain[name])


def write_config(architecture: Architecture) -> HfConfig:
    """`config.json`, without vocabulary, dtype and special tokens."""
    model, symbols = architecture.model, architecture.symbols
    kinds: dict[tuple[int | None, int], list[int]] = {}
    for i, options in architecture.attention_layers.items():
        kinds.setdefault((options.window, options.num_query_groups), []).append(i)
    attention = [
        {
            "layers": layers,
            "num_heads": model.num_attention_heads,
            "num_kv_heads": groups,
            "qkv_bias": False,
            "window_size": window,
            "rope_theta": float(model.rotary_base),
        }
        for (window, groups), layers in kinds.items()
    ]
    return {
        "architectures": ["GatedDeltaNetForCausalLM"],
        "model_type": "gated_deltanet",
        "attn_mode": "chunk",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "hidden_ratio": 4,  # read where intermediate_size is null
        "num_hidden_layers": len(symbols),
        "num_heads": model.linear_num_key_heads,
        "num_v_heads": model.linear_num_value_heads,
        "head_dim": model.linear_key_head_dim,
        "expand_v": _expand_v(model.linear_key_head_dim, model.linear_value_head_dim),
        "use_gate": model.use_output_gate,
        "use_short_conv": True,
        "conv_size": model.linear_conv_kernel_dim,
        "allow_neg_eigval": model.allow_neg_eigval,
        "norm_eps": model.norm_epsilon,
        "hidden_act": "swish",
        # One kind of attention as fla has always read it, two as it does since 2026-07.
        "attn": attention if len(attention) > 1 else attention[0] if attention else None,
    }


SETTINGS = Settings(
    used=(
        *("hidden_size", "intermediate_size", "hidden_ratio", "num_hidden_layers", "num_heads", "num_v_heads"),
        *("head_dim", "expand_v", "use_gate", "conv_size", "allow_neg_eigval", "norm_eps", "attn"),
    ),
    only={
        "use_short_conv": (True,),
        "hidden_act": ("swish", "silu"),
        "output_gate_activation": ("swish", "silu"),
        "attnres_block_size": (None,),
        "norm_first": (False,),
        "elementwise_affine": (True,),
    },
    without_effect=(
        *("attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp"),
    ),
)


def _expand_v(key_dim: int, value_dim: int) -> float:
    """The ratio that fla, which rounds down, multiplies to the very number."""
    ratio = value_dim / key_dim
    return ratio if int(key_dim * ratio) == value_dim else math.nextafter(ratio, math.inf)


def read_config(config: HfConfig) -> tuple[dict[str, Any], None]:
    """Fields of ModelConfig without those of the vocabulary, and no experts."""
    size, ratio = config["hidden_size"], config.get("hidden_ratio") or 4
    heads, head_dim = config["num_heads"], config.get("head_dim", 256)
    expand_v = config.get("expand_v", 2.0)
    if not math.isclose(head_dim * expand_v, int(head_dim * expand_v)):
        raise ConvertError(f"head_dim ({head_dim}) x expand_v ({expand_v}) must be a whole number.")
    fields = dict(
        hidden_size=size,
        ffn_hidden_size=config.get("intermediate_size") or 256 * math.ceil(int(size * ratio * 2 / 3) / 256),
        linear_num_key_heads=heads,
        linear_num_value_heads=config.get("num_v_heads") or heads,
        linear_key_head_dim=head_dim,
        linear_value_head_dim=int(head_dim * expand_v),
        linear_conv_kernel_dim=config.get("conv_size", 4),
        allow_neg_eigval=config.get("allow_neg_eigval", False),
        use_output_gate=config.get("use_gate", True),
        norm_epsilon=config.get("norm_eps", 1e-6),
    )
    symbols = ["G"] * config["num_hidden_layers"]
    attention = config.get("attn") or []
    for entry in [attention] if isinstance(attention, dict) else attention:
        _read_attention(entry, symbols, fields)
    return fields | dict(pattern="".join(f"{symbol}-" for symbol in symbols)), None


_ATTENTION = {"layers", "num_heads", "num_kv_heads", "qkv_bias", "window_size", "rope_theta"}


def _read_attention(entry: dict[str, Any], symbols: list[str], fields: dict[str, Any]) -> None:
    """Put an entry of `attn` into the pattern and the fields of the model."""
    if unknown := sorted(set(entry) - _ATTENTION):
        raise ConvertError(f"attn.{unknown[0]} ({entry[unknown[0]]}) is not known, and may change the model.")
    if entry.get("qkv_bias"):
        raise ConvertError("attn.qkv_bias (true) must be false: this project's attention has no biases.")
    window, base, heads = entry.get("window_size"), entry.get("rope_theta", 10000.0), entry["num_heads"]
    if base is None or base != int(base):
        raise ConvertError(f"attn.rope_theta ({base}) must be a whole number.")
    for name, value in dict(num_attention_heads=heads, rotary_base=int(base)).items():
        if fields.setdefault(name, value) != value:
            raise ConvertError(f"attn has layers of different {name}: this project has one value for all layers.")
    options = dict(window=window, num_query_groups=entry.get("num_kv_heads") or heads)
    # The first entry with or without a window says what all such layers have, further ones what theirs have.
    kind = "full_attention" if window is None else "sliding_attention"
    differ = fields.setdefault(kind, options) != options
    for i in entry["layers"]:
        if type(i) is not int or not 0 <= i < len(symbols) or symbols[i] != "G":
            raise ConvertError(
                f"attn.layers ({entry['layers']}) must name layers from 0 to {len(symbols) - 1}, and each once."
            )
        symbols[i] = "*" if window is None else "S"
        if differ:
            fields.setdefault("attention_layers", {})[i + 1] = options
