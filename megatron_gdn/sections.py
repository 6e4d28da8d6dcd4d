"""The one table of fused tensors: which sections a weight holds, in which order, and which heads a rank owns.

A fused weight stacks sections along one dimension, each made of heads; every tensor-parallel rank holds its heads of
every section, in the table's order. The layer, the initialisation, the checkpoints and the converters read this table,
so the packing is written down once.

Where the ranks do not divide the heads, some ranks own one key head (with its value heads) less and hold a ghost in its
place: rows of zeros. A head whose projections in and out are zero gives zero and gets zero gradients, and weight decay
keeps it at zero, so ghosts change no result; they cost the time of a head and are never written to disk.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Section:
    """Rows of one kind in a fused weight.

    name: the last part of its key on disk, such as `query` in `in_proj.weight.query`.
    num_heads: heads over all ranks.
    head_dim: rows of one head.
    heads_per_unit: neighbouring heads that a rank owns together, such as the value heads of one key head.
    """

    name: str
    num_heads: int
    head_dim: int
    heads_per_unit: int = 1

    @property
    def num_rows(self) -> int:
        """Rows over all ranks."""
        return self.num_heads * self.head_dim

    def local_rows(self, rank: int, size: int) -> slice:
        """The rows of the section's global weight that a rank owns; ranks differ by at most one unit."""
        num_units, unit_rows = self.num_heads // self.heads_per_unit, self.heads_per_unit * self.head_dim
        return slice(rank * num_units // size * unit_rows, (rank + 1) * num_units // size * unit_rows)

    def local_heads(self, rank: int, size: int) -> int:
        """Heads of the section that a rank owns, ghosts not counted."""
        rows = self.local_rows(rank, size)
        return (rows.stop - rows.start) // self.head_dim

    def padded_rows(self, size: int) -> int:
        """Rows that every one of `size` ranks holds, ghosts included."""
        return math.ceil(self.num_heads // self.heads_per_unit / size) * self.heads_per_unit * self.head_dim


def gated_delta_net_sections(
    *,
    num_key_heads: int,
    num_value_heads: int,
    key_head_dim: int,
    value_head_dim: int,
    output_gate: bool = True,
    decay: bool = True,
) -> dict[str, list[Section]]:
    """Sections of each fused weight of a Gated DeltaNet layer.

    Args:
        num_key_heads, num_value_heads: heads of q and k, heads of v and z.
        key_head_dim, value_head_dim: K and V.
        output_gate: whether z is projected.
        decay: whether there is a decay, with alpha, A_log and dt_bias.

    Returns:
        Sections by the name of the weight's module, or of the parameter; an empty section name is the whole weight.
    """
    unit = num_value_heads // num_key_heads
    query = Section(name="query", num_heads=num_key_heads, head_dim=key_head_dim)
    key = Section(name="key", num_heads=num_key_heads, head_dim=key_head_dim)
    value = Section(name="value", num_heads=num_value_heads, head_dim=value_head_dim, heads_per_unit=unit)
    z = Section(name="z", num_heads=num_value_heads, head_dim=value_head_dim, heads_per_unit=unit)
    beta = Section(name="beta", num_heads=num_value_heads, head_dim=1, heads_per_unit=unit)
    alpha = Section(name="alpha", num_heads=num_value_heads, head_dim=1, heads_per_unit=unit)
    of_decay = {"A_log": [replace(beta, name="")], "dt_bias": [replace(beta, name="")]}
    return {
        "in_proj": [query, key, value, z] if output_gate else [query, key, value],
        "in_proj_ba": [beta, alpha] if decay else [beta],
        "conv1d": [query, key, value],
        **(of_decay if decay else {}),
        "out_proj": [replace(value, name="")],
    }


def mamba2_sections(*, num_heads: int, head_dim: int, num_groups: int, state_dim: int) -> dict[str, list[Section]]:
    """Sections of each fused weight of a Mamba2 layer.

    Rows of B and C are dealt out one by one: with fewer groups than ranks, the ranks of a group hold a part of its
    state dimension each, so that no row lies on two ranks.

    Args:
        num_heads, head_dim: heads of x, z and dt, and P.
        num_groups, state_dim: groups of B and C, and N.

    Returns:
        Sections by the name of the weight's module (`conv1d`: its bias too), or of the parameter; an empty section name
        is the whole weight.
    """
    z, x = (Section(name=name, num_heads=num_heads, head_dim=head_dim) for name in ("z", "x"))
    B, C = (Section(name=name, num_heads=num_groups * state_dim, head_dim=1) for name in ("B", "C"))
    dt = Section(name="dt", num_heads=num_heads, head_dim=1)
    return {
        "in_proj": [z, x, B, C],
        "in_proj_dt": [dt],
        "conv1d": [x, B, C],
        **{name: [replace(dt, name="")] for name in ("A_log", "dt_bias", "D")},
        "norm": [replace(x, name="")],
        "out_proj": [replace(x, name="")],
    }


def check_mamba2(config: Any, tp_size: int) -> None:
    """Raise ValueError when heads, groups and tensor-parallel ranks do not fit together.

    Args:
        config: anything with mamba_num_heads, mamba_head_dim, mamba_num_groups, mamba_state_dim and hidden_size.
        tp_size: tensor_model_parallel_size.
    """
    heads, groups, state = config.mamba_num_heads, config.mamba_num_groups, config.mamba_state_dim
    if heads is None:
        raise ValueError(
            f"mamba_num_heads ({heads}) must be a number: Mamba2's own choice is 2 * hidden_size / mamba_head_dim = "
            f"{2 * config.hidden_size // config.mamba_head_dim}."
        )
    if heads % groups:
        raise ValueError(
            f"mamba_num_heads ({heads}) must be divisible by mamba_num_groups ({groups}): "
            f"use {groups * max(1, heads // groups)} heads."
        )
    if groups % tp_size and tp_size % groups:
        raise ValueError(
            f"mamba_num_groups ({groups}) must divide tensor_model_parallel_size ({tp_size}) or be a multiple of it: "
            f"use {tp_size} groups, or 1."
        )
    ranks = max(1, tp_size // groups)
    if state % ranks:
        raise ValueError(
            f"mamba_state_dim ({state}) must be divisible by the {ranks} tensor-parallel ranks that share a group: "
            f"use {ranks * max(1, state // ranks)}, or a smaller tensor_model_parallel_size."
        )


def attention_sections(
    *, num_attention_heads: int, num_query_groups: int, head_dim: int, output_gate: bool = False
) -> dict[str, list[Section]]:
    """Sections of each fused weight of an attention layer.

    Megatron's linear_qkv has, for each key head, the rows of its query heads, their gates, its k and its v.

    Args:
        num_attention_heads, num_query_groups: query heads, and key heads, which divide them.
        head_dim: size of a head.
        output_gate: whether gates are projected.

    Returns:
        Sections by the name of the weight's module, each the whole weight.
    """
    per_group = num_attention_heads // num_query_groups
    rows = (per_group * (2 if output_gate else 1) + 2) * head_dim
    heads = Section(name="", num_heads=num_attention_heads, head_dim=head_dim, heads_per_unit=per_group)
    return {
        "linear_qkv": [Section(name="", num_heads=num_query_groups, head_dim=rows)],
        "linear_proj": [heads],
    }


def held_heads(num_attention_heads: int, num_query_groups: int, tp_size: int) -> tuple[int, int]:
    """Query and key heads that all ranks hold together.

    As many as the layer has where the ranks divide its key heads, or share them evenly; else every rank holds as many
    key heads, with their query heads, as the one that owns most, some of them ghosts.

    Args:
        num_attention_heads, num_query_groups: of the layer.
        tp_size: tensor_model_parallel_size.
    """
    heads, groups = num_attention_heads, num_query_groups
    if groups % tp_size == 0 or (tp_size % groups == 0 and heads % tp_size == 0):
        return heads, groups
    padded = math.ceil(groups / tp_size) * tp_size
    return heads // groups * padded, padded


def swiglu_sections(ffn_hidden_size: int) -> list[Section]:
    """Sections of Megatron's `linear_fc1.weight` of a gated MLP: gate rows, then up rows."""
    return [Section(name=name, num_heads=ffn_hidden_size, head_dim=1) for name in ("gate", "up")]


def local_sizes(sections: Sequence[Section], size: int) -> list[int]:
    """Rows of each section on one of `size` ranks, ghosts included."""
    return [section.padded_rows(size) for section in sections]


def take_local(masters: Sequence[Tensor], sections: Sequence[Section], rank: int, size: int, dim: int = 0) -> Tensor:
    """A rank's fused weight from the global weights of its sections.

    Args:
        masters: one tensor per section, with `section.num_rows` along `dim`.
        sections: the fused weight's sections.
        rank, size: tensor-parallel rank and size.
        dim: along which sections lie.

    Returns:
        The rank's rows of all sections and its ghosts, stacked in order.
    """
    parts = []
    for master, section in zip(masters, sections, strict=True):
        rows = section.local_rows(rank, size)
        own = master.narrow(dim, rows.start, rows.stop - rows.start)
        parts.append(pad_ghosts(own, section.padded_rows(size), dim))
    return torch.cat(parts, dim)


def pad_ghosts(own: Tensor, num_rows: int, dim: int) -> Tensor:
    """Zeros behind a rank's own rows, up to `num_rows` along `dim`; the tensor itself where none are missing."""
    missing = num_rows - own.shape[dim]
    if missing == 0:
        return own
    shape = list(own.shape)
    shape[dim] = missing
    return torch.cat([own, own.new_zeros(shape)], dim)
