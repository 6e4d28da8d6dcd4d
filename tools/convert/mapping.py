"""How the weights of two formats correspond: rows of a table per format, and from them links, for both directions.

    Row("self_attention.in_proj.weight.{query,key,value}", "linear_attn.in_proj_qkv.weight", "stacked")

A row names keys of ours, keys of theirs, and a transform; braces stand for several keys. A conversion uses every link
once; a key that no link names, on either side, is an error.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from tools.convert.architecture import Architecture, Shape, expected_shapes, layer_key
from tools.convert.errors import ConvertError

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Link:
    """Weights that determine each other.

    ours, theirs: keys.
    rule: how, in words.
    to_theirs, to_ours: from all tensors of one side to all of the other, exact inverses of each other.
    keep_float32: stored in float32 whatever dtype is asked for.
    is_norm: never stored in less than it has.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    rule: str = "as it is"
    to_theirs: Callable[..., Tensors] = lambda *x: x
    to_ours: Callable[..., Tensors] = lambda *x: x
    keep_float32: bool = False
    is_norm: bool = False


@dataclass(frozen=True)
class Row:
    """A line of a table.

    ours, theirs: keys without the number of the layer; `{a,b}` stands for several, `#e` for every expert. Where only
        ours have it, one of theirs holds all experts.
    transform: a key of `TRANSFORMS`.
    """

    ours: str
    theirs: str
    transform: str = "same"


@dataclass(frozen=True, kw_only=True)
class Table:
    """The names of a format.

    norm_center: what its norms add to their weight, 0 or 1, or None for what the model's add; the norm of Gated
        DeltaNet's output adds 0 everywhere.
    prefix: of a layer's keys; `{}` is its number, from 0.
    model, output: rows outside of layers; `output` where the embedding is not the output too.
    layer, mlp, experts: rows of each layer, of its MLP, of its mixture of experts.
    mixers: rows by symbol of the pattern. A row whose weight the model has not, such as a norm of q, does not count.
    ignored: their keys that hold nothing, as patterns, with the reason.
    """

    norm_center: float | None
    prefix: str
    model: Sequence[Row]
    output: Sequence[Row]
    layer: Sequence[Row]
    mlp: Sequence[Row]
    mixers: Mapping[str, Sequence[Row]]
    experts: Sequence[Row] = ()
    ignored: Mapping[str, str] = field(default_factory=dict)

    def links(self, architecture: Architecture) -> list[Link]:
        """The links of a model, in the order of its layers."""
        shapes = expected_shapes(architecture)
        found: list[Link] = []

        def add(rows: Iterable[Row], layer: int | None = None) -> None:
            for row in rows:
                for ours, theirs in self._keys(row, layer, architecture):
                    if any(key in shapes for key in ours):
                        found.append(
                            TRANSFORMS[row.transform](_Context(self, architecture, shapes, layer), ours, theirs)
                        )

        embedding, *rest = self.model
        add([embedding])
        for i, layer in enumerate(architecture.layers):
            add(self.layer, i)
            add(self.mixers[layer.symbol], i)
            if layer.mlp:
                add(self.experts if architecture.has_experts(i) else self.mlp, i)
        add(rest)
        if not architecture.model.tie_embeddings:
            add(self.output)
        missing = sorted(set(shapes) - {key for link in found for key in link.ours})
        assert not missing, f"the table has no row for {missing[0]}"
        return found

    def _keys(self, row: Row, layer: int | None, architecture: Architecture):
        """Keys of both sides, once or for every expert."""
        ours, theirs = _expand(row.ours), _expand(row.theirs)
        if layer is not None:
            ours = [layer_key(layer, name) for name in ours]
            theirs = [self.prefix.format(layer) + name for name in theirs]
        if not row.ours.endswith("#e"):
            return [(tuple(ours), tuple(theirs))]
        experts = range(architecture.experts.num_experts)
        if "#e" not in row.theirs:
            return [(tuple(f"{key[:-1]}{e}" for key in ours for e in experts), tuple(theirs))]
        return [
            (tuple(f"{key[:-1]}{e}" for key in ours), tuple(key.replace("#e", str(e)) for key in theirs))
            for e in experts
        ]


def _expand(name: str) -> list[str]:
    """`a.{b,c}.d` to `a.b.d` and `a.c.d`."""
    match = re.search(r"\{([^}]*)\}", name)
    if match is None:
        return [name]
    return [
        found for part in match[1].split(",") for found in _expand(name[: match.start()] + part + name[match.end() :])
    ]


@dataclass(frozen=True)
class _Context:
    """What a transform may read."""

    table: Table
    architecture: Architecture
    shapes: dict[str, Shape]
    layer: int | None

    def rows(self, keys: Iterable[str]) -> list[int]:
        """Rows of our weights."""
        return [self.shapes[key][0] for key in keys]


def _same(_, ours, theirs) -> Link:
    return Link(ours=ours, theirs=theirs)


def _float32(_, ours, theirs) -> Link:
    return Link(ours=ours, theirs=theirs, keep_float32=True)


def _shifted(ours, theirs, shift: float, *, keep_float32: bool = False) -> Link:
    """A norm's weight whose formats differ in what they add to it, in float32."""
    if shift == 0:
        return Link(ours=ours, theirs=theirs, keep_float32=keep_float32, is_norm=True)
    return Link(
        ours=ours,
        theirs=theirs,
        rule=f"theirs = ours {'+' if shift > 0 else '-'} {abs(shift):g}",
        to_theirs=lambda x: (x.float() + shift,),
        to_ours=lambda x: (x.float() - shift,),
        keep_float32=True,
        is_norm=True,
    )


def _norm(context: _Context, ours, theirs) -> Link:
    center = float(context.architecture.model.zero_centered_norm)
    return _shifted(ours, theirs, 0.0 if context.table.norm_center is None else center - context.table.norm_center)


def _out_norm(context: _Context, ours, theirs) -> Link:
    return _shifted(ours, theirs, float(context.architecture.zero_centered_out_norm), keep_float32=True)


def _stacked(context: _Context, ours, theirs) -> Link:
    """Several weights of ours whose rows, one after the other, are those of one of theirs."""
    ours = tuple(key for key in ours if key in context.shapes)
    sizes = context.rows(ours)
    return Link(
        ours=ours,
        theirs=theirs,
        rule="rows of ours one after the other",
        to_theirs=lambda *parts: (torch.cat(parts),),
        to_ours=lambda x: x.split(sizes),
    )


def _halves(context: _Context, ours, theirs) -> Link:
    """One weight of ours whose first rows are those of one of theirs and whose last of another."""
    half = context.rows(ours)[0] // 2
    return Link(
        ours=ours,
        theirs=theirs,
        rule="rows of theirs one after the other",
        to_theirs=lambda x: x.split(half),
        to_ours=lambda *parts: (torch.cat(parts),),
    )


def _packed(_, ours, theirs) -> Link:
    """The weights of all experts, which are one of theirs."""
    return Link(
        ours=ours,
        theirs=theirs,
        rule="theirs has an expert after the other",
        to_theirs=lambda *parts: (torch.stack(parts),),
        to_ours=lambda x: x.unbind(),
    )


def _per_key_head(context: _Context, ours, theirs) -> Link:
    """Rows of one of theirs: for each key head its rows of each of ours."""
    heads, H = context.architecture.model.linear_num_key_heads, context.architecture.model.hidden_size
    sizes = [rows // heads for rows in context.rows(ours)]
    return Link(
        ours=ours,
        theirs=theirs,
        rule=f"for each of {heads} key heads, rows {' + '.join(map(str, sizes))}",
        to_theirs=lambda *parts: (torch.cat([x.view(heads, -1, H) for x in parts], dim=1).view(-1, H),),
        to_ours=lambda x: tuple(part.reshape(-1, H) for part in x.view(heads, sum(sizes), H).split(sizes, dim=1)),
    )


def _attention(context: _Context, ours, theirs) -> Link:
    """Megatron's rows, for each key/value head: its query heads, their gates, its key, its value. Theirs are q, k, v;
    q has, for each head, its query and its gate."""
    architecture = context.architecture
    heads, groups, D = architecture.attention_heads(context.layer)
    gate = architecture.attention_layers[context.layer].output_gate
    each, H = heads // groups, architecture.model.hidden_size

    def to_theirs(fused: Tensor) -> Tensors:
        sizes = [each, each, 1, 1] if gate else [each, 1, 1]
        *queries, k, v = fused.view(groups, sum(sizes), D, H).split(sizes, dim=1)
        return torch.stack(queries, dim=2).reshape(-1, H), k.reshape(-1, H), v.reshape(-1, H)

    def to_ours(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
        queries = q.view(groups, each, 2 if gate else 1, D, H).unbind(2)
        return (torch.cat([*queries, k.view(groups, 1, D, H), v.view(groups, 1, D, H)], dim=1).view(-1, H),)

    rule = f"for each of {groups} key heads {each} queries{', their gates' if gate else ''}, key, value"
    return Link(ours=ours, theirs=theirs, rule=rule, to_theirs=to_theirs, to_ours=to_ours)


TRANSFORMS: dict[str, Callable[[_Context, tuple[str, ...], tuple[str, ...]], Link]] = {
    "same": _same,
    "float32": _float32,
    "norm": _norm,
    "out norm": _out_norm,
    "stacked": _stacked,
    "halves": _halves,
    "packed": _packed,
    "per key head": _per_key_head,
    "attention": _attention,
}


def check_complete(links: Iterable[Link], *, ours: Iterable[str] | None = None, theirs: Iterable[str] | None = None):
    """Raise ConvertError unless the links name every present key exactly once and no other.

    Args:
        links: of a model.
        ours, theirs: keys that are there; None: not checked.
    """
    links = list(links)
    for side, present in (("ours", ours), ("theirs", theirs)):
        if present is None:
            continue
        named = [key for link in links for key in getattr(link, side)]
        present = set(present)
        assert len(named) == len(set(named)), "a table names a key twice"
        if missing := sorted(set(named) - present):
            raise ConvertError(f"the checkpoint lacks {some(missing)}: it is not what its configuration says.")
        if unknown := sorted(present - set(named)):
            raise ConvertError(
                f"no rule converts {some(unknown)}: the format has no place for them; --drop PATTERN leaves out what "
                "may be lost."
            )


def matching(keys: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Keys that one of the shell patterns matches, sorted."""
    patterns = list(patterns)
    return sorted(key for key in keys if any(fnmatchcase(key, pattern) for pattern in patterns))


def some(keys: list[str]) -> str:
    """The first of them, in words."""
    return ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
