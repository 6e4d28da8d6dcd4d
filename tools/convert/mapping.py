"""How the weights of two formats correspond: a table of links, each used in both directions.

A link names keys of ours and keys of theirs, and the functions between them. A conversion uses every link once; a key
that no link names, on either side, is an error.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tools.convert.errors import ConvertError

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Link:
    """Weights that determine each other.

    ours, theirs: keys.
    to_theirs, to_ours: from all tensors of one side to all of the other, exact inverses of each other.
    keep_float32: stored in float32 whatever dtype is asked for.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_theirs: Callable[..., Tensors] = lambda *x: x
    to_ours: Callable[..., Tensors] = lambda *x: x
    keep_float32: bool = False


def same(ours: str, theirs: str, *, keep_float32: bool = False) -> Link:
    """One weight under two names."""
    return Link(ours=(ours,), theirs=(theirs,), keep_float32=keep_float32)


def shifted(ours: str, theirs: str, shift: float, *, keep_float32: bool = False) -> Link:
    """A norm's weight whose formats differ in what they add to it: theirs = ours + shift, in float32."""
    if shift == 0:
        return same(ours, theirs, keep_float32=keep_float32)
    return Link(
        ours=(ours,),
        theirs=(theirs,),
        to_theirs=lambda x: ((x.float() + shift).to(x.dtype),),
        to_ours=lambda x: ((x.float() - shift).to(x.dtype),),
        keep_float32=True,
    )


def stacked(ours: str, theirs: Sequence[str], sizes: Sequence[int]) -> Link:
    """One weight of ours whose rows are those of several of theirs, one after the other."""
    return Link(
        ours=(ours,),
        theirs=tuple(theirs),
        to_theirs=lambda x: x.split(list(sizes)),
        to_ours=lambda *parts: (torch.cat(parts),),
    )


def unstacked(ours: Sequence[str], theirs: str, sizes: Sequence[int]) -> Link:
    """Several weights of ours whose rows, one after the other, are those of one of theirs."""
    return Link(
        ours=tuple(ours),
        theirs=(theirs,),
        to_theirs=lambda *parts: (torch.cat(parts),),
        to_ours=lambda x: x.split(list(sizes)),
    )


def check_complete(links: Iterable[Link], *, ours: Iterable[str] | None = None, theirs: Iterable[str] | None = None):
    """Raise ConvertError unless the links name every present key exactly once and no other.

    Args:
        links: the table.
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
            raise ConvertError(f"the checkpoint lacks {_some(missing)}: it is not what its configuration says.")
        if unknown := sorted(present - set(named)):
            raise ConvertError(f"no rule converts {_some(unknown)}: the format has no place for them.")


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
