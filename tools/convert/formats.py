"""The Hugging Face formats that hold these models, and which of them can hold a given one.

gated_deltanet    fla: Gated DeltaNet, with plain or sliding-window attention
qwen3_5_text      transformers: Gated DeltaNet, with gated attention
qwen3_next        transformers: the same, with fused projections
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_gdn.config import AttentionConfig, ModelConfig
from megatron_gdn.hybrid.pattern import parse_pattern
from tools.convert.errors import ConvertError
from tools.convert.layers import Names, attention_links, common_links, ours
from tools.convert.mapping import Link, same, unstacked

HfConfig = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Format:
    """A model type of Hugging Face.

    name: `model_type`.
    obstacles: reasons why it cannot hold a model; none: it can.
    write_config: `config.json` of a model, without vocabulary, dtype and special tokens.
    read_config: fields of ModelConfig from their configuration; raises ConvertError for what has no equal here.
    links: weights.
    """

    name: str
    obstacles: Callable[[ModelConfig], list[str]]
    write_config: Callable[[ModelConfig], HfConfig]
    read_config: Callable[[HfConfig], dict[str, Any]]
    links: Callable[[ModelConfig], list[Link]]


def choose_format(model: ModelConfig, wanted: str = "auto") -> Format:
    """The format to export to.

    Raises:
        ConvertError: no format holds the model, or the wanted one does not, with the reasons.
    """
    candidates = list(FORMATS.values()) if wanted == "auto" else [FORMATS[wanted]]
    reasons = {}
    for candidate in candidates:
        reasons[candidate.name] = candidate.obstacles(model)
        if not reasons[candidate.name]:
            return candidate
    lines = [f"{name}: {'; '.join(found)}" for name, found in reasons.items()]
    raise ConvertError("no format holds this model exactly.\n  " + "\n  ".join(lines))


def _symbols(model: ModelConfig) -> list[str]:
    return [layer.symbol for layer in parse_pattern(model.pattern)]


def _common_obstacles(model: ModelConfig) -> list[str]:
    layers = parse_pattern(model.pattern)
    found = []
    if not any(layer.symbol == "G" for layer in layers):
        found.append("it has Gated DeltaNet layers only beside others")
    if any(layer.symbol == "M" for layer in layers):
        found.append("it has no Mamba2 layers")
    if not all(layer.mlp for layer in layers):
        found.append("every layer has an MLP there")
    if not model.use_decay:
        found.append("its state always decays (use_decay is false)")
    if not model.use_qk_l2norm:
        found.append("it always normalises q and k (use_qk_l2norm is false)")
    if model.attention_layers or model.sliding_attention.num_query_groups or model.full_attention.num_query_groups:
        found.append("all attention layers have the options of their symbol and the model's key/value heads")
    return found


# ---- gated_deltanet


def _fla_obstacles(model: ModelConfig) -> list[str]:
    found = _common_obstacles(model)
    for symbol, options in (("S", model.sliding_attention), ("*", model.full_attention)):
        plain = AttentionConfig(window=options.window)
        if symbol in _symbols(model) and options != plain:
            found.append("its attention has full rotary embedding, no norm of q and k, and no gate")
    if model.symbols & {"S", "*"} and model.kv_channels not in (None, model.hidden_size // model.num_attention_heads):
        found.append("its attention heads have hidden_size / num_attention_heads channels")
    return found


def _fla_config(model: ModelConfig) -> HfConfig:
    config: HfConfig = {
        "architectures": ["GatedDeltaNetForCausalLM"],
        "model_type": "gated_deltanet",
        "attn_mode": "chunk",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": len(_symbols(model)),
        "num_heads": model.linear_num_key_heads,
        "num_v_heads": model.linear_num_value_heads,
        "head_dim": model.linear_key_head_dim,
        "expand_v": model.linear_value_head_dim / model.linear_key_head_dim,
        "use_gate": model.use_output_gate,
        "use_short_conv": True,
        "conv_size": model.linear_conv_kernel_dim,
        "allow_neg_eigval": model.allow_neg_eigval,
        "norm_eps": model.norm_epsilon,
        "hidden_act": "swish",
    }
    attention = []
    for symbol, options in (("S", model.sliding_attention), ("*", model.full_attention)):
        layers = [i for i, found in enumerate(_symbols(model)) if found == symbol]
        if layers:
            attention.append(
                {
                    "layers": layers,
                    "num_heads": model.num_attention_heads,
                    "num_kv_heads": model.num_query_groups or model.num_attention_heads,
                    "qkv_bias": False,
                    "window_size": options.window,
                    "rope_theta": float(model.rotary_base),
                }
            )
    config["attn"] = attention if len(attention) > 1 else attention[0] if attention else None
    return config


def _fla_fields(config: HfConfig) -> dict[str, Any]:
    refused = {
        "use_short_conv": (config.get("use_short_conv", True), True),
        "hidden_act": (config.get("hidden_act", "swish"), "swish"),
        "output_gate_activation": (
            {"silu": "swish"}.get(a := config.get("output_gate_activation", "swish"), a),
            "swish",
        ),
        "attnres_block_size": (config.get("attnres_block_size"), None),
    }
    for name, (value, possible) in refused.items():
        if value != possible:
            raise ConvertError(f"{name} ({value}) must be {possible}: this project has no equal of it.")
    size, ratio = config["hidden_size"], config.get("hidden_ratio") or 4
    heads, head_dim = config["num_heads"], config["head_dim"]
    fields = dict(
        hidden_size=size,
        ffn_hidden_size=config.get("intermediate_size") or 256 * math.ceil(int(size * ratio * 2 / 3) / 256),
        linear_num_key_heads=heads,
        linear_num_value_heads=config.get("num_v_heads") or heads,
        linear_key_head_dim=head_dim,
        linear_value_head_dim=int(head_dim * config.get("expand_v", 2.0)),
        linear_conv_kernel_dim=config.get("conv_size", 4),
        allow_neg_eigval=config.get("allow_neg_eigval", False),
        use_output_gate=config.get("use_gate", True),
        norm_epsilon=config.get("norm_eps", 1e-6),
    )
    symbols = ["G"] * config["num_hidden_layers"]
    attention = config.get("attn") or []
    for entry in [attention] if isinstance(attention, dict) else attention:
        if entry.get("qkv_bias"):
            raise ConvertError("attn.qkv_bias (true) must be false: this project's attention has no biases.")
        window = entry.get("window_size")
        for i in entry["layers"]:
            symbols[i] = "*" if window is None else "S"
        added = dict(
            num_attention_heads=entry["num_heads"],
            num_query_groups=entry.get("num_kv_heads") or entry["num_heads"],
            rotary_base=int(entry.get("rope_theta", 10000)),
        )
        if window is not None:
            added["sliding_attention"] = dict(window=window)
        for name, value in added.items():
            if fields.setdefault(name, value) != value:
                raise ConvertError(
                    f"attn has layers of different {name}: this project has one value for all of a kind."
                )
    return fields | dict(pattern="".join(f"{symbol}-" for symbol in symbols))


def _fla_links(model: ModelConfig) -> list[Link]:
    names = Names(
        embedding="model.embeddings.weight",
        input_norm="model.layers.{}.attn_norm.weight",
        mlp_norm="model.layers.{}.mlp_norm.weight",
        mlp="model.layers.{}.mlp",
        final_norm="model.norm.weight",
        output="lm_head.weight",
        norm_center=0.0,
    )
    links = common_links(model, names)
    renamed = {"query": "q", "key": "k", "value": "v", "z": "g", "beta": "b", "alpha": "a"}
    for i, symbol in enumerate(_symbols(model)):
        prefix = f"model.layers.{i}.attn"
        if symbol != "G":
            links += attention_links(model, i, prefix, gate=False, qk_norm=False, center=0.0)
            continue
        for section, short in renamed.items():
            if section == "z" and not model.use_output_gate:
                continue
            links.append(same(ours(i, f"self_attention.in_proj.weight.{section}"), f"{prefix}.{short}_proj.weight"))
        for section in ("query", "key", "value"):
            theirs = f"{prefix}.{renamed[section]}_conv1d.weight"
            links.append(same(ours(i, f"self_attention.conv1d.weight.{section}"), theirs))
        links += [
            same(ours(i, "self_attention.A_log"), f"{prefix}.A_log", keep_float32=True),
            same(ours(i, "self_attention.dt_bias"), f"{prefix}.dt_bias", keep_float32=True),
            same(ours(i, "self_attention.out_norm.weight"), f"{prefix}.o_norm.weight", keep_float32=True),
            same(ours(i, "self_attention.out_proj.weight"), f"{prefix}.o_proj.weight"),
        ]
    return links


# ---- qwen3_5_text and qwen3_next


def _qwen_obstacles(model: ModelConfig) -> list[str]:
    found = _common_obstacles(model)
    if model.allow_neg_eigval:
        found.append("its beta is below 1 (allow_neg_eigval is true)")
    if not model.use_output_gate:
        found.append("its Gated DeltaNet always has an output gate (use_output_gate is false)")
    if "S" in model.symbols:
        found.append("it has no sliding windows")
    options = model.full_attention
    if "*" in model.symbols and not (options.rope and options.qk_norm and options.output_gate):
        found.append("its attention has rotary embedding, norms of q and k, and an output gate")
    return found


def _qwen_config(model: ModelConfig, name: str, architecture: str) -> HfConfig:
    options, heads = model.full_attention, model.num_attention_heads or 1
    head_dim = model.kv_channels or model.hidden_size // heads
    rope = {"rope_type": "default", "rope_theta": float(model.rotary_base)}
    return {
        "architectures": [architecture],
        "model_type": name,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": len(_symbols(model)),
        "layer_types": ["linear_attention" if symbol == "G" else "full_attention" for symbol in _symbols(model)],
        "num_attention_heads": heads,
        "num_key_value_heads": model.num_query_groups or heads,
        "head_dim": head_dim,
        "rope_parameters": rope | {"partial_rotary_factor": options.rotary_percent},
        "rope_theta": rope["rope_theta"],  # read by older versions, as the next
        "partial_rotary_factor": options.rotary_percent,
        "attention_bias": False,
        "hidden_act": "silu",
        "linear_num_key_heads": model.linear_num_key_heads,
        "linear_num_value_heads": model.linear_num_value_heads,
        "linear_key_head_dim": model.linear_key_head_dim,
        "linear_value_head_dim": model.linear_value_head_dim,
        "linear_conv_kernel_dim": model.linear_conv_kernel_dim,
        "rms_norm_eps": model.norm_epsilon,
    }


def _qwen_fields(config: HfConfig) -> dict[str, Any]:
    for name, possible in (("attention_bias", False), ("hidden_act", "silu"), ("num_experts", 0)):
        if config.get(name, possible) not in (possible, None):
            raise ConvertError(f"{name} ({config[name]}) must be {possible}: this project has no equal of it.")
    rope = config.get("rope_parameters") or config
    interval = config.get("full_attention_interval", 4)
    types = config.get("layer_types") or [
        "full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(config["num_hidden_layers"])
    ]
    symbols = {"linear_attention": "G-", "full_attention": "*-"}
    return dict(
        pattern="".join(symbols[kind] for kind in types),
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        **{name: config[name] for name in config if name.startswith("linear_") and name in ModelConfig.__annotations__},
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"],
        kv_channels=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        rotary_base=int(rope.get("rope_theta", 10000)),
        full_attention=dict(
            rotary_percent=rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.25)),
            qk_norm=True,
            output_gate=True,
        ),
        zero_centered_norm=True,
        norm_epsilon=config["rms_norm_eps"],
    )


def _qwen_links(model: ModelConfig, projections: Callable[[ModelConfig, int, str], list[Link]]) -> list[Link]:
    names = Names(
        embedding="model.embed_tokens.weight",
        input_norm="model.layers.{}.input_layernorm.weight",
        mlp_norm="model.layers.{}.post_attention_layernorm.weight",
        mlp="model.layers.{}.mlp",
        final_norm="model.norm.weight",
        output="lm_head.weight",
        norm_center=1.0,
    )
    links = common_links(model, names)
    K = model.linear_num_key_heads * model.linear_key_head_dim
    V = model.linear_num_value_heads * model.linear_value_head_dim
    for i, symbol in enumerate(_symbols(model)):
        if symbol == "*":
            links += attention_links(model, i, f"model.layers.{i}.self_attn", gate=True, qk_norm=True, center=1.0)
            continue
        prefix = f"model.layers.{i}.linear_attn"
        links += projections(model, i, prefix)
        conv = [ours(i, f"self_attention.conv1d.weight.{name}") for name in ("query", "key", "value")]
        links += [
            unstacked(conv, f"{prefix}.conv1d.weight", [K, K, V]),
            same(ours(i, "self_attention.A_log"), f"{prefix}.A_log", keep_float32=True),
            same(ours(i, "self_attention.dt_bias"), f"{prefix}.dt_bias", keep_float32=True),
            same(ours(i, "self_attention.out_norm.weight"), f"{prefix}.norm.weight", keep_float32=True),
            same(ours(i, "self_attention.out_proj.weight"), f"{prefix}.out_proj.weight"),
        ]
    return links


def _split_projections(model: ModelConfig, layer: int, prefix: str) -> list[Link]:
    """qwen3_5_text: q, k, v stacked, the others by themselves."""
    K = model.linear_num_key_heads * model.linear_key_head_dim
    V = model.linear_num_value_heads * model.linear_value_head_dim
    in_proj = ours(layer, "self_attention.in_proj.weight")
    return [
        unstacked(
            [f"{in_proj}.{name}" for name in ("query", "key", "value")], f"{prefix}.in_proj_qkv.weight", [K, K, V]
        ),
        same(f"{in_proj}.z", f"{prefix}.in_proj_z.weight"),
        same(f"{in_proj}.beta", f"{prefix}.in_proj_b.weight"),
        same(f"{in_proj}.alpha", f"{prefix}.in_proj_a.weight"),
    ]


def _fused_projections(model: ModelConfig, layer: int, prefix: str) -> list[Link]:
    """qwen3_next: rows per key head: its q, k, and the v, z of its value heads; and its b, a."""
    heads, group = model.linear_num_key_heads, model.linear_num_value_heads // model.linear_num_key_heads
    K, V, H = model.linear_key_head_dim, model.linear_value_head_dim, model.hidden_size
    in_proj = ours(layer, "self_attention.in_proj.weight")

    def link(names: list[str], theirs: str, sizes: list[int]) -> Link:
        def to_theirs(*parts: Tensor) -> tuple[Tensor, ...]:
            return (torch.cat([part.view(heads, -1, H) for part in parts], dim=1).reshape(-1, H),)

        def to_ours(fused: Tensor) -> tuple[Tensor, ...]:
            return tuple(part.reshape(-1, H) for part in fused.view(heads, sum(sizes), H).split(sizes, dim=1))

        keys = tuple(f"{in_proj}.{name}" for name in names)
        return Link(ours=keys, theirs=(f"{prefix}.{theirs}.weight",), to_theirs=to_theirs, to_ours=to_ours)

    return [
        link(["query", "key", "value", "z"], "in_proj_qkvz", [K, K, group * V, group * V]),
        link(["beta", "alpha"], "in_proj_ba", [group, group]),
    ]


FORMATS = {
    found.name: found
    for found in (
        Format(
            name="gated_deltanet",
            obstacles=_fla_obstacles,
            write_config=_fla_config,
            read_config=_fla_fields,
            links=_fla_links,
        ),
        Format(
            name="qwen3_5_text",
            obstacles=_qwen_obstacles,
            write_config=lambda model: _qwen_config(model, "qwen3_5_text", "Qwen3_5ForCausalLM"),
            read_config=_qwen_fields,
            links=lambda model: _qwen_links(model, _split_projections),
        ),
        Format(
            name="qwen3_next",
            obstacles=_qwen_obstacles,
            write_config=lambda model: _qwen_config(model, "qwen3_next", "Qwen3NextForCausalLM") | {"num_experts": 0},
            read_config=_qwen_fields,
            links=lambda model: _qwen_links(model, _fused_projections),
        ),
    )
}
