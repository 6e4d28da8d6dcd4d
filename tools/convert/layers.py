"""Links of the parts that all formats share, from tables of their names."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_gdn.config import ModelConfig
from megatron_gdn.hybrid.pattern import parse_pattern
from megatron_gdn.sections import gated_delta_net_sections
from tools.convert.errors import ConvertError
from tools.convert.mapping import Link, same, shifted, stacked


@dataclass(frozen=True, kw_only=True)
class Names:
    """How a format calls what every model has; `{}` is the number of the layer, from 0.

    norm_center: what the format's norms add to their weight, 0 or 1.
    """

    embedding: str
    input_norm: str
    mlp_norm: str
    mlp: str
    final_norm: str
    output: str
    norm_center: float


def ours(layer: int, name: str) -> str:
    """Our key of a layer's weight."""
    return f"decoder.layers.{layer}.{name}"


def common_links(model: ModelConfig, names: Names) -> list[Link]:
    """Links of embedding, norms, MLPs and output."""
    shift = float(model.zero_centered_norm) - names.norm_center
    links = [same("embedding.word_embeddings.weight", names.embedding)]
    for i, layer in enumerate(parse_pattern(model.pattern)):
        links.append(shifted(ours(i, "input_layernorm.weight"), names.input_norm.format(i), shift))
        if layer.mlp:
            mlp = names.mlp.format(i)
            links += [
                shifted(ours(i, "pre_mlp_layernorm.weight"), names.mlp_norm.format(i), shift),
                stacked(
                    ours(i, "mlp.linear_fc1.weight"),
                    [f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"],
                    [model.ffn_hidden_size] * 2,
                ),
                same(ours(i, "mlp.linear_fc2.weight"), f"{mlp}.down_proj.weight"),
            ]
    links.append(shifted("decoder.final_layernorm.weight", names.final_norm, shift))
    if not model.tie_embeddings:
        links.append(same("output_layer.weight", names.output))
    return links


def expected_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every weight of a model by our keys on disk, the vocabulary's rows as 0.

    Args:
        model: without Mamba2 layers, which no format holds.
    """
    H, inner = model.hidden_size, model.ffn_hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (0, H)}
    for i, layer in enumerate(parse_pattern(model.pattern)):
        shapes[ours(i, "input_layernorm.weight")] = (H,)
        if layer.mlp:
            shapes[ours(i, "pre_mlp_layernorm.weight")] = (H,)
            shapes[ours(i, "mlp.linear_fc1.weight")] = (2 * inner, H)
            shapes[ours(i, "mlp.linear_fc2.weight")] = (H, inner)
        mixer = _rule_shapes(model) if layer.symbol == "G" else _attention_shapes(model, layer.symbol)
        shapes |= {ours(i, f"self_attention.{name}"): shape for name, shape in mixer.items()}
    shapes["decoder.final_layernorm.weight"] = (H,)
    if not model.tie_embeddings:
        shapes["output_layer.weight"] = (0, H)
    return shapes


def _rule_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    sections = gated_delta_net_sections(
        num_key_heads=model.linear_num_key_heads,
        num_value_heads=model.linear_num_value_heads,
        key_head_dim=model.linear_key_head_dim,
        value_head_dim=model.linear_value_head_dim,
        output_gate=model.use_output_gate,
    )
    H, V = model.hidden_size, model.linear_num_value_heads * model.linear_value_head_dim
    shapes = {
        f"in_proj.weight.{section.name}": (section.num_rows, H)
        for name in ("in_proj", "in_proj_ba")
        for section in sections[name]
    }
    for section in sections["conv1d"]:
        shapes[f"conv1d.weight.{section.name}"] = (section.num_rows, 1, model.linear_conv_kernel_dim)
    heads = (model.linear_num_value_heads,)
    norm = (model.linear_value_head_dim,)
    return shapes | {"A_log": heads, "dt_bias": heads, "out_norm.weight": norm, "out_proj.weight": (H, V)}


def _attention_shapes(model: ModelConfig, symbol: str) -> dict[str, tuple[int, ...]]:
    options = model.sliding_attention if symbol == "S" else model.full_attention
    heads, D = model.num_attention_heads, model.kv_channels or model.hidden_size // model.num_attention_heads
    rows = heads * (2 if options.output_gate else 1) + 2 * (model.num_query_groups or heads)
    shapes = {"linear_qkv.weight": (rows * D, model.hidden_size), "linear_proj.weight": (model.hidden_size, heads * D)}
    return shapes | ({"q_layernorm.weight": (D,), "k_layernorm.weight": (D,)} if options.qk_norm else {})


def check_shapes(model: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ConvertError unless the weights have the shapes of the model; the vocabulary may be padded."""
    for key, expected in expected_shapes(model).items():
        found = shapes[key]
        if len(found) != len(expected) or any(e and e != f for e, f in zip(expected, found, strict=True)):
            wanted = [size or "vocabulary" for size in expected]
            raise ConvertError(f"{key} would have the shape {list(found)}, and the configuration says {wanted}.")


def attention_links(model: ModelConfig, layer: int, prefix: str, *, gate: bool, qk_norm: bool, center: float):
    """Links of an attention layer whose q, k, v and o are projections of their own.

    Megatron's fused rows are, per key/value head: its query heads, their gates, its key, its value.

    Args:
        prefix: their name of the layer's attention.
        gate: whether q_proj holds, per head, its query and its output gate.
        qk_norm: whether there are norms of q and k.
        center: what their norms add to the weight.
    """
    heads, D = model.num_attention_heads, model.kv_channels or model.hidden_size // model.num_attention_heads
    groups = model.num_query_groups or heads
    per_group, H = heads // groups, model.hidden_size

    def to_theirs(fused: Tensor) -> tuple[Tensor, ...]:
        sizes = [per_group, per_group, 1, 1] if gate else [per_group, 1, 1]
        *queries, k, v = fused.view(groups, sum(sizes), D, H).split(sizes, dim=1)
        # A head's query and its gate lie beside each other there.
        q = torch.stack(queries, dim=2).reshape(-1, H)
        return q, k.reshape(-1, H), v.reshape(-1, H)

    def to_ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        queries = q.view(groups, per_group, 2 if gate else 1, D, H).unbind(2)
        return (torch.cat([*queries, k.view(groups, 1, D, H), v.view(groups, 1, D, H)], dim=1).reshape(-1, H),)

    links = [
        Link(
            ours=(ours(layer, "self_attention.linear_qkv.weight"),),
            theirs=tuple(f"{prefix}.{name}_proj.weight" for name in "qkv"),
            to_theirs=to_theirs,
            to_ours=to_ours,
        ),
        same(ours(layer, "self_attention.linear_proj.weight"), f"{prefix}.o_proj.weight"),
    ]
    if qk_norm:
        shift = float(model.zero_centered_norm) - center
        links += [
            shifted(ours(layer, f"self_attention.{x}_layernorm.weight"), f"{prefix}.{x}_norm.weight", shift)
            for x in "qk"
        ]
    return links
