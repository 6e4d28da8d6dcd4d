"""Hybrid patterns: one string that says which mixer each layer has and where the MLPs are.

    G  Gated DeltaNet      S  sliding-window attention      -  MLP after the mixer before it
    M  Mamba2              *  full attention

`"G-S-"` is H1, `"M-G-S-"` is H2 of the paper (arXiv 2412.06464, section 3.4). `"G-G-G-*-"` is four layers, each a mixer
and an MLP. A group in parentheses repeats: `"(G-G-G-*-)x6"` is 24 layers; groups may hold groups.
"""

import re
from dataclasses import dataclass

MIXERS = {"G": "Gated DeltaNet", "M": "Mamba2", "S": "sliding-window attention", "*": "full attention"}
_MOST_SYMBOLS = 20_000
_REPEAT = re.compile(r"x([1-9]\d*)")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of a pattern.

    symbol: the mixer, a key of `MIXERS`.
    mlp: whether an MLP follows.
    """

    symbol: str
    mlp: bool


def parse_pattern(pattern: str) -> list[Layer]:
    """Layers of a pattern, in order.

    Args:
        pattern: symbols of this module's docstring; spaces are ignored.

    Raises:
        ValueError: empty, an unknown symbol, an MLP without a mixer, or an unmatched parenthesis; the message points at
            the character.
    """
    layers: list[Layer] = []
    for symbol, i in _expand(pattern):
        if symbol in MIXERS:
            layers.append(Layer(symbol=symbol, mlp=False))
        elif symbol != "-":
            raise _error(pattern, i, f"use {' '.join([*MIXERS, '-'])} or (...)xN")
        elif layers and not layers[-1].mlp:
            layers[-1] = Layer(symbol=layers[-1].symbol, mlp=True)
        else:
            raise _error(pattern, i, "an MLP follows a mixer")
    if not layers:
        raise ValueError(f"pattern ({pattern!r}) must name at least one mixer: use {' '.join(MIXERS)}.")
    return layers


def _expand(pattern: str) -> list[tuple[str, int]]:
    """Characters with their places in the pattern, groups repeated, spaces left out."""
    found: list[tuple[str, int]] = []
    open_groups: list[tuple[list[tuple[str, int]], int]] = []  # what stands before the group, where it starts
    i = 0
    while i < len(pattern):
        if pattern[i] == "(":
            open_groups.append((found, i))
            found = []
        elif pattern[i] == ")":
            repeat = _REPEAT.match(pattern, i + 1)
            if not open_groups or not repeat:
                raise _error(pattern, i, "a group is (...)xN with N of at least 1")
            before, _ = open_groups.pop()
            # Before it is expanded: a number in a file must not take all memory.
            times = int(repeat[1][:9])
            if len(before) + len(found) * times > _MOST_SYMBOLS:
                raise _error(pattern, i + 1, f"groups repeat to at most {_MOST_SYMBOLS} symbols")
            found = before + found * times
            i = repeat.end() - 1
        elif not pattern[i].isspace():
            found.append((pattern[i], i))
        i += 1
    if open_groups:
        raise _error(pattern, open_groups[-1][1], "a group is (...)xN, and this one is not closed")
    return found


def _error(pattern: str, i: int, rule: str) -> ValueError:
    return ValueError(f"pattern has {pattern[i]!r} at character {i + 1}: {rule}.\n  {pattern}\n  {' ' * i}^")
