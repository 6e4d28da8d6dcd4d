"""Fragments against a list of tokens that is cut by hand."""

import pytest
import torch

from megatron_gdn.parallel.fragments import check_fragments, prepare_fragments

T = 48
# Boundaries at, next to and far from the edges of 2, 4 and 8 fragments; documents of 0, 1 and 2 tokens.
DOCUMENTS = [None, [0, T], [0, 12, 24, 48], [0, 1, 3, 11, 13, 23, 24, 24, 25, 47, T], [0, 5, 40, T]]


def tokens_of(layout: str, rank: int, size: int) -> list[int]:
    """Megatron's rule for zigzag, and the obvious one, token by token."""
    if layout == "contiguous":
        return list(range(T))[rank * T // size : (rank + 1) * T // size]
    parts = [list(range(T))[i * T // (2 * size) : (i + 1) * T // (2 * size)] for i in range(2 * size)]
    return parts[rank] + parts[2 * size - 1 - rank]


def document_of(token: int, bounds: list[int]) -> int:
    """The start of a token's document."""
    return max(bound for bound in bounds if bound <= token)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("bounds", DOCUMENTS)
def test_every_rank_knows_its_tokens_and_documents(layout, size, bounds):
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    whole = torch.arange(2 * T).view(2, T, 1) if bounds is None else torch.arange(T).view(1, T, 1)
    real = bounds or [0, T]
    parts = []
    for rank in range(size):
        fragments = prepare_fragments(T, layout=layout, rank=rank, size=size, cu_seqlens=cu_seqlens)
        tokens = tokens_of(layout, rank, size)
        assert [token for low, high in fragments.token_ranges for token in range(low, high)] == tokens
        assert fragments.num_local_tokens == len(tokens) == T // size
        assert torch.equal(fragments.local(whole), whole[:, tokens])
        assert fragments.positions.tolist() == [token - document_of(token, real) for token in tokens]
        for fragment in range(fragments.num_fragments):
            low, high = fragments.range_of(fragment)
            assert fragments.document_starts[fragment] == document_of(low, real)
            assert fragments.starts_document(fragment) == (low in real)
            assert fragments.passes_on(fragment) == (high not in real)
            assert fragments.is_reset(fragment) == any(token in real for token in range(low, high))
            owner, place = fragments.place_of(fragment)
            assert fragments.owned_by(owner)[place] == fragment
        local = fragments.local(whole)
        assert torch.equal(fragments.unfold(fragments.fold(local)), local)
        if bounds is None:
            assert fragments.table is None and fragments.fold(local).shape[1] == fragments.length
        else:
            # Pieces: runs of tokens that follow each other within a document and a fragment.
            numbers, pieces = [], []
            for place, token in enumerate(tokens):
                new = place % fragments.length == 0 or token in real
                pieces = [*pieces, 1] if new else [*pieces[:-1], pieces[-1] + 1]
                numbers.append(len(pieces) - 1)
            assert fragments.table.lengths == pieces
            assert fragments.table.document_of_tokens().tolist() == numbers
            assert fragments.first_piece == numbers[:: fragments.length]
            assert fragments.last_piece == numbers[fragments.length - 1 :: fragments.length]
        parts.append(local)
    assert torch.equal(fragments.join(parts), whole)
    assert fragments.crossed == any(fragments.passes_on(fragment) for fragment in range(fragments.num_fragments))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            dict(num_tokens=50, size=4),
            r"sequence length \(50\) must be .* 4 fragments .*: use 52 tokens, or fewer",
        ),
        (dict(num_tokens=52, size=4, layout="zigzag"), r"\(52\) must be .* 8 fragments .*: use 56 tokens"),
        (dict(num_tokens=0, size=2), r"sequence length \(0\) must be a positive multiple"),
        (dict(num_tokens=8, size=2, layout="zigzag", conv_width=4), r"= 2\) must be at least .* - 1 \(3\): use 12 tok"),
        (dict(num_tokens=64, size=2, window=65), r"window \(65\) must not exceed the sequence \(64 tokens\) under"),
        (dict(num_tokens=64, size=2, layout="ring"), r"layout \(ring\) must be 'contiguous' or 'zigzag'"),
    ],
)
def test_sequences_that_cannot_be_divided_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_fragments(**(dict(layout="contiguous") | arguments))


def test_what_fits_is_not_refused():
    check_fragments(12, layout="zigzag", size=2, conv_width=4, window=12)
    check_fragments(2, layout="contiguous", size=1, conv_width=4, window=100)  # one rank exchanges nothing


def test_batches_that_do_not_fit_the_fragments_are_refused():
    fragments = prepare_fragments(T, rank=0, size=2, cu_seqlens=torch.tensor([0, 7, T]))
    with pytest.raises(ValueError, match=r"cu_seqlens \(ends at 24\) must end at the whole sequence \(48 tokens\)"):
        prepare_fragments(T, rank=0, size=2, cu_seqlens=torch.tensor([0, 24]))
    with pytest.raises(ValueError, match=r"dimension 1 \(24\) must be those of the whole sequence \(48\)"):
        fragments.local(torch.zeros(1, 24))
    with pytest.raises(ValueError, match=r"x \(48 tokens\) must hold this rank's 24 of 48 tokens, 2 context-parallel"):
        fragments.check(torch.zeros(1, 48), "x")
    with pytest.raises(ValueError, match=r"batch \(2\) must be 1 with packed documents"):
        fragments.check(torch.zeros(2, 24), "x")
    fragments.check(torch.zeros(1, 24), "x")
