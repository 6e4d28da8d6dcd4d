"""transformers' `qwen3_5_text` and `qwen3_next`: Gated DeltaNet with gated attention, and their mixtures of experts."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from tools.convert.architecture import Architecture, Experts
from tools.convert.errors import ConvertError
from tools.convert.mapping import Row, Table
from tools.convert.obstacles import common_obstacles
from tools.convert.settings import HfConfig, Settings

_COMMON = (
    Row("self_attention.conv1d.weight.{query,key,value}", "linear_attn.conv1d.weight", "stacked"),
    Row("self_attention.A_log", "linear_attn.A_log", "float32"),
    Row("self_attention.dt_bias", "linear_attn.dt_bias", "float32"),
    Row("self_attention.out_norm.weight", "linear_attn.norm.weight", "out norm"),
    Row("self_attention.out_proj.weight", "linear_attn.out_proj.weight"),
)
_ATTENTION = (
    Row("self_attention.linear_qkv.weight", "self_attn.{q,k,v}_proj.weight", "attention"),
    Row("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
    Row("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "norm"),
    Row("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "norm"),
)
_MLP_NORM = Row("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "norm")
QWEN3_5_TEXT = Table(
    norm_center=1,
    prefix="model.layers.{}.",
    model=(
        Row("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        Row("decoder.final_layernorm.weight", "model.norm.weight", "norm"),
    ),
    output=(Row("output_layer.weight", "lm_head.weight"),),
    layer=(Row("input_layernorm.weight", "input_layernorm.weight", "norm"),),
    mlp=(
        _MLP_NORM,
        Row("mlp.linear_fc1.weight", "mlp.{gate,up}_proj.weight", "halves"),
        Row("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
    ),
    mixers={
        "G": (
            Row("self_attention.in_proj.weight.{query,key,value}", "linear_attn.in_proj_qkv.weight", "stacked"),
            Row("self_attention.in_proj.weight.z", "linear_attn.in_proj_z.weight"),
            Row("self_attention.in_proj.weight.beta", "linear_attn.in_proj_b.weight"),
            Row("self_attention.in_proj.weight.alpha", "linear_attn.in_proj_a.weight"),
            *_COMMON,
        ),
        "*": _ATTENTION,
    },
)
_EXPERTS = (
    _MLP_NORM,
    Row("mlp.router.weight", "mlp.gate.weight"),
    Row("mlp.experts.experts.linear_fc1.weight#e", "mlp.experts.#e.{gate,up}_proj.weight", "halves"),
    Row("mlp.experts.experts.linear_fc2.weight#e", "mlp.experts.#e.down_proj.weight"),
    Row("mlp.shared_experts.linear_fc1.weight", "mlp.shared_expert.{gate,up}_proj.weight", "halves"),
    Row("mlp.shared_experts.linear_fc2.weight", "mlp.shared_expert.down_proj.weight"),
    Row("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight"),
)
QWEN3_5_MOE_TEXT = replace(QWEN3_5_TEXT, experts=_EXPERTS)
# As models of this type are laid out in memory, and released.
QWEN3_5_MOE_TEXT_PACKED = replace(
    QWEN3_5_TEXT,
    experts=(
        Row("mlp.experts.experts.linear_fc1.weight#e", "mlp.experts.gate_up_proj", "packed"),
        Row("mlp.experts.experts.linear_fc2.weight#e", "mlp.experts.down_proj", "packed"),
        *(row for row in _EXPERTS if "#e" not in row.ours),
    ),
)
QWEN3_NEXT = replace(
    QWEN3_5_TEXT,
    mixers={
        "G": (
            Row("self_attention.in_proj.weight.{query,key,value,z}", "linear_attn.in_proj_qkvz.weight", "per key head"),
            Row("self_attention.in_proj.weight.{beta,alpha}", "linear_attn.in_proj_ba.weight", "per key head"),
            *_COMMON,
        ),
        "*": _ATTENTION,
    },
    experts=_EXPERTS,
)


def qwen3_5_text_table(names: Iterable[str]) -> Table:
    """There is one form of it."""
    return QWEN3_5_TEXT


def qwen3_5_moe_text_table(names: Iterable[str]) -> Table:
    """Experts by themselves, as transformers writes them, or packed in one weight of a layer."""
    packed = any(name.endswith(".mlp.experts.gate_up_proj") for name in names)
    return QWEN3_5_MOE_TEXT_PACKED if packed else QWEN3_5_MOE_TEXT


def qwen3_next_table(names: Iterable[str]) -> Table:
    """There is one form of it."""
    return QWEN3_NEXT


def obstacles(architecture: Architecture) -> list[str]:
    """Reasons why either format cannot hold a model."""
    model, found = architecture.model, common_obstacles(architecture)
    if model.allow_neg_eigval:
        found.append("its beta is below 1 (allow_neg_eigval is true)")
    if not model.use_output_gate:
        found.append("its Gated DeltaNet always has an output gate (use_output_gate is false)")
    if "S" in architecture.symbols:
        found.append("it has no sliding windows")
    attention = list(architecture.attention_layers.values())
    lacking = [name for name in ("rope", "qk_norm", "output_gate") if not all(getattr(x, name) for x in attention)]
    if lacking:
        missing = ", ".join(f"{name} is false" for name in lacking)
        found.append(f"its attention has rotary embedding, norms of q and k, and an output gate ({missing})")
    if any(options != attention[0] for options in attention):
        found.append("all its attention layers have the same options (attention_layers)")
    return found


def qwen3_5_text_obstacles(architecture: Architecture) -> list[str]:
    """Reasons why qwen3_5_text cannot hold a model."""
    return obstacles(architecture) + (["it has no experts: qwen3_next has"] if architecture.experts else [])


def qwen3_5_moe_text_obstacles(architecture: Architecture) -> list[str]:
    """Reasons why qwen3_5_moe_text cannot hold a model."""
    every = all(architecture.has_experts(i) for i in range(len(architecture.layers)))
    return obstacles(architecture) + ([] if every else ["every MLP of it has experts"])


def _write_config(architecture: Architecture, name: str, class_name: str) -> HfConfig:
    model, symbols = architecture.model, architecture.symbols
    heads, groups, head_dim, share = 1, 1, model.hidden_size, 1.0  # asked for without attention too
    for i, options in architecture.attention_layers.items():
        heads, groups, head_dim = architecture.attention_heads(i)
        share = options.rotary_percent
    rope = {"rope_type": "default", "rope_theta": float(model.rotary_base)}
    return {
        "architectures": [class_name],
        "model_type": name,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": len(symbols),
        "layer_types": ["linear_attention" if symbol == "G" else "full_attention" for symbol in symbols],
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "rope_parameters": rope | {"partial_rotary_factor": share},
        "rope_theta": rope["rope_theta"],  # read by older versions, as the next
        "partial_rotary_factor": share,
        "attention_bias": False,
        "hidden_act": "silu",
        "linear_num_key_heads": model.linear_num_key_heads,
        "linear_num_value_heads": model.linear_num_value_heads,
        "linear_key_head_dim": model.linear_key_head_dim,
        "linear_value_head_dim": model.linear_value_head_dim,
        "linear_conv_kernel_dim": model.linear_conv_kernel_dim,
        "rms_norm_eps": model.norm_epsilon,
    }


def write_qwen3_5_text(architecture: Architecture) -> HfConfig:
    """`config.json`, without vocabulary, dtype and special tokens."""
    return _write_config(architecture, "qwen3_5_text", "Qwen3_5ForCausalLM")


def write_qwen3_5_moe_text(architecture: Architecture) -> HfConfig:
    """`config.json`, without vocabulary, dtype and special tokens."""
    config = _write_config(architecture, "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM")
    del config["intermediate_size"]  # of MLPs without experts
    return config | _write_experts(architecture.experts)


def _write_experts(experts: Experts) -> HfConfig:
    return {
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.top_k,
        "moe_intermediate_size": experts.ffn_hidden_size,
        "shared_expert_intermediate_size": experts.shared_ffn_hidden_size,
    }


def write_qwen3_next(architecture: Architecture) -> HfConfig:
    """`config.json`, without vocabulary, dtype and special tokens."""
    config = _write_config(architecture, "qwen3_next", "Qwen3NextForCausalLM")
    experts = architecture.experts
    if experts is None:
        return config | {"num_experts": 0}
    return config | {
        **_write_experts(experts),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(len(architecture.layers)) if i not in experts.layers],
    }


_USED = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "layer_types", "full_attention_interval"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters", "rope_theta"),
    *("partial_rotary_factor", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim"),
    *("linear_value_head_dim", "linear_conv_kernel_dim", "rms_norm_eps", "rope_scaling"),
)
_ONLY = {"attention_bias": (False,), "hidden_act": ("silu", "swish"), "attn_output_gate": (True,)}
_USED_OF_EXPERTS = (
    *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"),
)
# Predictions further ahead are weights of their own, which no rule converts.
_MTP = ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype")
_ROUTER = ("router_aux_loss_coef", "output_router_logits")
QWEN3_5_TEXT_SETTINGS = Settings(used=_USED, only=_ONLY, without_effect=_MTP)
QWEN3_5_MOE_TEXT_SETTINGS = Settings(used=(*_USED, *_USED_OF_EXPERTS), only=_ONLY, without_effect=(*_MTP, *_ROUTER))
QWEN3_NEXT_SETTINGS = Settings(
    used=(*_USED, *_USED_OF_EXPERTS, "mlp_only_layers", "decoder_sparse_step"),
    only=_ONLY | {"norm_topk_prob": (True,)},
    without_effect=_ROUTER,
)

# Rotary settings beside the base: how three-dimensional positions are mixed, which are equal in text.
_ROPE = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved"}


def _rope(config: HfConfig) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}
    for found in (rope, config.get("rope_scaling") or {}):
        kind = found.get("rope_type", found.get("type", "default"))
        unknown = sorted(set(found) - _ROPE)
        if kind != "default" or unknown:
            what = f"rope_type ({kind})" if kind != "default" else f"{unknown[0]} ({found[unknown[0]]})"
            raise ConvertError(f"{what}: this project has rotary embedding without scaling only (rope_type default).")
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rope and config.get(name, rope[name]) != rope[name]:
            raise ConvertError(
                f"{name} ({config[name]}) and that of rope_parameters ({rope[name]}) differ: leave one of them out."
            )
    base = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if base != int(base):
        raise ConvertError(f"rope_theta ({base}) must be a whole number.")
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.25))
    return dict(rotary_base=int(base), rotary_percent=share)


_DEFAULTS = {
    "num_attention_heads": 16,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "rms_norm_eps": 1e-6,
}


def read_config(config: HfConfig) -> tuple[dict[str, Any], Experts | None]:
    """Fields of ModelConfig without those of the vocabulary, and the experts."""
    config = _DEFAULTS | config
    rope, interval = _rope(config), config.get("full_attention_interval") or 4
    types = config.get("layer_types") or [
        "linear_attention" if (i + 1) % interval else "full_attention" for i in range(config["num_hidden_layers"])
    ]
    every_mlp_has_experts = config["model_type"] == "qwen3_5_moe_text"
    symbols = {"linear_attention": "G-", "full_attention": "*-"}
    if len(types) != config["num_hidden_layers"] or not set(types) <= symbols.keys():
        raise ConvertError(f"layer_types ({types}) must be {config['num_hidden_layers']} of {', '.join(symbols)}.")
    fields = dict(
        pattern="".join(symbols[kind] for kind in types),
        hidden_size=config["hidden_size"],
        # A model whose MLPs all have experts has no width of plain ones.
        ffn_hidden_size=config["shared_expert_intermediate_size" if every_mlp_has_experts else "intermediate_size"],
        **{name: config[name] for name in _DEFAULTS if name.startswith("linear_")},
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"],
        kv_channels=config["head_dim"],
        rotary_base=rope["rotary_base"],
        full_attention=dict(rotary_percent=rope["rotary_percent"], qk_norm=True, output_gate=True),
        zero_centered_norm=True,
        norm_epsilon=config["rms_norm_eps"],
    )
    return fields, _read_experts(config, len(types))


def _read_experts(config: HfConfig, num_layers: int) -> Experts | None:
    defaults = {"qwen3_next": 512, "qwen3_5_moe_text": 256}
    number = config.get("num_experts", defaults[config["model_type"]]) if config["model_type"] in defaults else 0
    step, plain = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    layers = tuple(i for i in range(num_layers) if i not in plain and number > 0 and (i + 1) % step == 0)
    if not layers:
        return None
    return Experts(
        num_experts=number,
        top_k=config["num_experts_per_tok"],
        ffn_hidden_size=config["moe_intermediate_size"],
        shared_ffn_hidden_size=config["shared_expert_intermediate_size"],
        layers=layers,
    )
