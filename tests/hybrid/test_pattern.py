"""Patterns against hand-written expansions, and errors that point at the character."""

import pytest

from megatron_gdn.hybrid.pattern import parse_pattern


def symbols(pattern: str) -> str:
    return "".join(layer.symbol + "-" * layer.mlp for layer in parse_pattern(pattern))


@pytest.mark.parametrize(
    "pattern, expanded",
    [
        ("G-", "G-"),
        ("GG-*", "GG-*"),
        ("(G-)x4", "G-G-G-G-"),
        ("(G-G-G-*-)x2 G-", "G-G-G-*-G-G-G-*-G-"),
        ("G-(*-)x1", "G-*-"),
        ("M-G-S-", "M-G-S-"),
        ("((G-)x2 S)x2", "G-G-SG-G-S"),
    ],
)
def test_expansion(pattern, expanded):
    assert symbols(pattern) == expanded


def test_the_longest_pattern():
    assert symbols("(G-)x10000") == "G-" * 10_000


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("G-X-", r"pattern has 'X' at character 3: use G M S \* - or \(...\)xN.\n  G-X-\n    \^"),
        ("(G-)x3 X", r"pattern has 'X' at character 8: use .*\n  \(G-\)x3 X\n         \^"),
        ("-G", r"pattern has '-' at character 1: an MLP follows a mixer"),
        ("G--", r"pattern has '-' at character 3: an MLP follows a mixer"),
        ("(-G)x2", r"pattern has '-' at character 2: an MLP follows a mixer"),
        ("G-(G-", r"pattern has '\(' at character 3: a group is \(...\)xN, and this one is not closed"),
        ("(G-)", r"pattern has '\)' at character 4: a group is \(...\)xN with N of at least 1"),
        ("G-)x2", r"pattern has '\)' at character 3: a group is"),
        ("(G-)x0", r"pattern has '\)' at character 4: a group is \(...\)xN with N of at least 1"),
        (f"((G-)x10)x{10**40}", r"pattern has 'x' at character 10: groups repeat to at most 20000 symbols"),
        ("(G-)x5000 (S-)x5001", r"pattern has 'x' at character 15: groups repeat to at most 20000 symbols"),
        ("", r"pattern \(''\) must name at least one mixer"),
        ("()x2", r"must name at least one mixer"),
    ],
)
def test_errors(pattern, message):
    with pytest.raises(ValueError, match=message):
        parse_pattern(pattern)
