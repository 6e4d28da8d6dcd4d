"""What a converter knows of a model: its configuration, its experts, and the shape of every weight by our keys on disk.

Our keys are Megatron-Core's. A weight of all experts is one tensor on disk, and its part of one expert has a key of its
own here: `mlp.experts.experts.linear_fc1.weight#3`, so that experts are read and written one at a time.
"""

from dataclasses import dataclass

from megatron_gdn.config import AttentionConfig, ModelConfig
from megatron_gdn.hybrid.pattern import Layer, parse_pattern
from megatron_gdn.sections import gated_delta_net_sections, mamba2_sections, swiglu_sections
from tools.convert.errors import ConvertError

Shape = tuple[int, ...]
MOST_LAYERS, MOST_EXPERTS = 10_000, 10_000
"""A file must not say how long its reading runs."""


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Mixture-of-experts MLPs, as Qwen3-Next has them: softmax over all, the largest `top_k`, their weights made 1.

    num_experts, top_k: in a layer, and of a token.
    ffn_hidden_size, shared_ffn_hidden_size: inner widths of an expert, and of the expert that every token passes.
    layers: numbers of the layers that have them, from 0; the others have a plain MLP.
    """

    num_experts: int
    top_k: int
    ffn_hidden_size: int
    shared_ffn_hidden_size: int
    layers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model, and how its checkpoint writes it.

    model: configuration.
    experts: of the layers that have some; this project's training has none.
    zero_centered_out_norm: the norm of Gated DeltaNet's output is stored as weight - 1, as Megatron-Core does with
        layernorm_zero_centered_gamma. This project's is not.
    """

    model: ModelConfig
    experts: Experts | None = None
    zero_centered_out_norm: bool = False

    @property
    def layers(self) -> list[Layer]:
        """Of the pattern."""
        return parse_pattern(self.model.pattern)

    @property
    def symbols(self) -> list[str]:
        """Mixer of each layer."""
        return [layer.symbol for layer in self.layers]

    def has_experts(self, layer: int) -> bool:
        """Whether the MLP of a layer is a mixture of experts."""
        return self.experts is not None and layer in self.experts.layers

    @property
    def attention_layers(self) -> dict[int, AttentionConfig]:
        """Options of the attention layers by their number from 0."""
        return {i: self.model.attention_options(i + 1) for i, symbol in enumerate(self.symbols) if symbol in "S*"}

    def attention_heads(self, layer: int) -> tuple[int, int, int]:
        """Query heads, key/value heads, channels of a head."""
        model = self.model
        return model.num_attention_heads, self.attention_layers[layer].num_query_groups, model.attention_head_dim


def layer_key(layer: int, name: str) -> str:
    """Our key of a layer's weight."""
    return f"decoder.layers.{layer}.{name}"


def expected_shapes(architecture: Architecture) -> dict[str, Shape]:
    """Shape of every weight by our keys, the vocabulary's rows as 0."""
    model = architecture.model
    H = model.hidden_size
    shapes: dict[str, Shape] = {"embedding.word_embeddings.weight": (0, H)}
    for i, layer in enumerate(architecture.layers):
        found: dict[str, Shape] = {"input_layernorm.weight": (H,)}
        if layer.mlp:
            found["pre_mlp_layernorm.weight"] = (H,)
            found |= _expert_shapes(architecture) if architecture.has_experts(i) else _mlp_shapes(model)
        mixers = {"G": _gated_delta_net_shapes, "M": _mamba2_shapes}
        mixer = mixers.get(layer.symbol, _attention_shapes)(architecture, i)
        found |= {f"self_attention.{name}": shape for name, shape in mixer.items()}
        shapes |= {layer_key(i, name): shape for name, shape in found.items()}
    shapes["decoder.final_layernorm.weight"] = (H,)
    if not model.tie_embeddings:
        shapes["output_layer.weight"] = (0, H)
    return shapes


def check_shapes(architecture: Architecture, shapes: dict[str, Shape]) -> None:
    """Raise ConvertError unless the weights have the shapes of the model; the vocabulary may be padded."""
    for key, expected in expected_shapes(architecture).items():
        found = shapes[key]
        if len(found) != len(expected) or any(e and e != f for e, f in zip(expected, found, strict=True)):
            wanted = [size or "vocabulary" for size in expected]
            raise ConvertError(f"{key} would have the shape {list(found)}, and the configuration says {wanted}.")


def _mlp_shapes(model: ModelConfig) -> dict[str, Shape]:
    H, inner = model.hidden_size, model.ffn_hidden_size
    rows = sum(section.num_rows for section in swiglu_sections(inner))
    return {"mlp.linear_fc1.weight": (rows, H), "mlp.linear_fc2.weight": (H, inner)}


def _expert_shapes(architecture: Architecture) -> dict[str, Shape]:
    experts, H = architecture.experts, architecture.model.hidden_size
    inner, shared = experts.ffn_hidden_size, experts.shared_ffn_hidden_size
    shapes = {"mlp.router.weight": (experts.num_experts, H)}
    for e in range(experts.num_experts):
        shapes[f"mlp.experts.experts.linear_fc1.weight#{e}"] = (2 * inner, H)
        shapes[f"mlp.experts.experts.linear_fc2.weight#{e}"] = (H, inner)
    return shapes | {
        "mlp.shared_experts.linear_fc1.weight": (2 * shared, H),
        "mlp.shared_experts.linear_fc2.weight": (H, shared),
        "mlp.shared_experts.gate_weight": (1, H),
    }


def _gated_delta_net_shapes(architecture: Architecture, _) -> dict[str, Shape]:
    model = architecture.model
    sections = gated_delta_net_sections(
        num_key_heads=model.linear_num_key_heads,
        num_value_heads=model.linear_num_value_heads,
        key_head_dim=model.linear_key_head_dim,
        value_head_dim=model.linear_value_head_dim,
        output_gate=model.use_output_gate,
        decay=model.use_decay,
    )
    H, (out,) = model.hidden_size, sections["out_proj"]
    projected = sections["in_proj"] + sections["in_proj_ba"]  # beta and alpha are sections of in_proj on disk
    shapes: dict[str, Shape] = {f"in_proj.weight.{section.name}": (section.num_rows, H) for section in projected}
    for section in sections["conv1d"]:
        shapes[f"conv1d.weight.{section.name}"] = (section.num_rows, 1, model.linear_conv_kernel_dim)
    for name in ("A_log", "dt_bias") if model.use_decay else ():
        (section,) = sections[name]
        shapes[name] = (section.num_rows,)
    return shapes | {"out_norm.weight": (model.linear_value_head_dim,), "out_proj.weight": (H, out.num_rows)}


def _mamba2_shapes(architecture: Architecture, _) -> dict[str, Shape]:
    model = architecture.model
    sections = mamba2_sections(
        num_heads=model.mamba_num_heads,
        head_dim=model.mamba_head_dim,
        num_groups=model.mamba_num_groups,
        state_dim=model.mamba_state_dim,
    )
    H, (out,) = model.hidden_size, sections["out_proj"]
    projected = sections["in_proj"] + sections["in_proj_dt"]
    shapes: dict[str, Shape] = {f"in_proj.weight.{section.name}": (section.num_rows, H) for section in projected}
    for section in sections["conv1d"]:
        shapes[f"conv1d.weight.{section.name}"] = (section.num_rows, 1, model.linear_conv_kernel_dim)
        shapes[f"conv1d.bias.{section.name}"] = (section.num_rows,)
    for name in ("A_log", "dt_bias", "D", "norm"):
        (section,) = sections[name]
        shapes["norm.weight" if name == "norm" else name] = (section.num_rows,)
    return shapes | {"out_proj.weight": (H, out.num_rows)}


def _attention_shapes(architecture: Architecture, layer: int) -> dict[str, Shape]:
    options, (heads, groups, D) = architecture.attention_layers[layer], architecture.attention_heads(layer)
    H, rows = architecture.model.hidden_size, heads * (2 if options.output_gate else 1) + 2 * groups
    shapes = {"linear_qkv.weight": (rows * D, H), "linear_proj.weight": (H, heads * D)}
    return shapes | ({"q_layernorm.weight": (D,), "k_layernorm.weight": (D,)} if options.qk_norm else {})
