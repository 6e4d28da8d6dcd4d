"""Operators under context parallelism against one rank: outputs, every gradient, bytes sent, errors."""

import re

import pytest
import torch

from tests.parallel import context_operators
from tests.ranks import pool

# float64: sums of some hundred terms in another order, and products of the fold.
TOLERANCE = 1e-10
T = 96  # fragments of 48, 24 and 12 tokens
DOCUMENTS = [
    None,  # two rows, one document each
    [0, 12, 24, 48, 72, T],  # at the edges of fragments
    [0, 1, 11, 13, 23, 25, 47, 48, 49, 50, 71, 95, T],  # next to edges, of 1 and 2 tokens
    [0, 6, 30, 55, 82, T],  # far from edges
    [0, T],  # across all ranks
]
OPERATORS = [
    ("conv", {}),
    ("gated delta", {}),
    ("gated delta", dict(state_exchange="scan", use_qk_l2norm_in_kernel=True)),
    ("mamba", {}),
    ("mamba", dict(state_exchange="scan")),
    ("attention", dict(window=5)),
    ("attention", dict(window=60)),  # over several ranks
    ("attention", dict(window=T)),
    ("attention", dict(cp_comm_type="all_gather")),
    ("attention", dict(cp_comm_type="a2a")),
]


def run(function, cases, size):
    return pool(4).run(function, cases, groups=dict(context_parallel_size=size))


def assert_small(size, cases, tolerance):
    for rank, found in enumerate(run(context_operators.all_errors, cases, size)):
        for case, errors in zip(cases, found, strict=True):
            assert len(errors) > 3 and all(error <= tolerance for error in errors.values()), (rank, case, errors)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("size", [2, 4])
def test_operators_equal_one_rank(size, layout):
    cases = [((name, T, layout, bounds), options) for name, options in OPERATORS for bounds in DOCUMENTS]
    assert_small(size, cases, TOLERANCE)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_fragments_of_many_chunks(layout):
    """Fragments of 288 and 144 tokens, which are no whole chunks."""
    bounds = [None, [0, 100, 700, 1152]]
    cases = [((name, 1152, layout, b), {}) for name in ("gated delta", "mamba", "conv") for b in bounds]
    assert_small(4, cases, TOLERANCE)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_triton_equals_one_rank(layout):
    # float32 in the interpreter, as the kernels' own tests.
    options = dict(dtype=torch.float32, backend="triton")
    cases = [((name, T, layout, [0, 6, 30, T]), options) for name in ("gated delta", "conv", "mamba")]
    assert_small(2, cases, 1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_states_travel_in_float32(layout):
    """With inputs of 16 bits and under autocast: rounded to bfloat16 on the way they would be off by 2**-9."""
    options = [("gated delta", {}), ("gated delta", dict(state_exchange="scan")), ("mamba", {})]
    cases = [
        ((name, layout, dtype, dtype is torch.float32), more)
        for name, more in options
        for dtype in (torch.bfloat16, torch.float32)
    ]
    for rank, found in enumerate(run(context_operators.all_float32_errors, cases, 4)):
        for case, errors in zip(cases, found, strict=True):
            assert len(errors) >= 1 and all(error <= 1e-4 for error in errors.values()), (rank, case, errors)


def test_one_rank_needs_no_group():
    cases = [((name, T, layout, DOCUMENTS[2]), {}) for name, _ in OPERATORS[:4] for layout in ("contiguous", "zigzag")]
    [found] = pool(1).run(context_operators.all_errors, cases, groups={})
    assert all(error <= TOLERANCE for errors in found for error in errors.values())


def test_what_is_sent_does_not_grow_with_the_sequence():
    """Counted against the sizes of what has to travel: 4 ranks, float64, one row."""
    size, fragments = 4, 4
    M_and_S, S = 2 * (8 * 8 + 8 * 6) * 8, 2 * 8 * 6 * 8
    scalar_and_S = 4 * (5 * 3 + 1) * 8
    rows = 3 * 6 * 8  # of the convolution
    window, key_value_row = 7, 4 * (6 + 5) * 8
    forward = {
        "conv": {"all_to_all_single": rows},
        "gated delta": {"all_gather_into_tensor": (size - 1) * M_and_S},
        "mamba": {"all_gather_into_tensor": (size - 1) * scalar_and_S},
        "attention": {"all_to_all_single": (window - 1) * key_value_row},
    }
    backward = forward | {
        "gated delta": {"all_gather_into_tensor": (size - 1) * S},
        "mamba": {"all_gather_into_tensor": (size - 1) * 4 * 5 * 3 * 8},
    }
    options = {"attention": dict(window=window)}
    cases = [((name, tokens, "contiguous", None), options.get(name, {})) for name in forward for tokens in (T, 4 * T)]
    for rank, found in enumerate(run(context_operators.all_traffic, cases, size)):
        for ((name, *_), _), (sent, returned) in zip(cases, found, strict=True):
            first, last = rank == 0, rank == fragments - 1
            is_rows = name in ("conv", "attention")
            # The last rank has nobody to send rows to, the first nobody to send their gradients to.
            assert sent == ({"all_to_all_single": 0} if is_rows and last else forward[name]), (name, rank)
            assert returned == ({"all_to_all_single": 0} if is_rows and first else backward[name]), (name, rank)


def test_a_scan_sends_log2_of_the_ranks():
    """Two doubling steps over 4 ranks and the shift to the next one; the first rank sends most, backward the last."""
    M_and_S, S = 2 * (8 * 8 + 8 * 6) * 8, 2 * 8 * 6 * 8
    found = run(
        context_operators.all_traffic, [(("gated delta", T, "contiguous", None), dict(state_exchange="scan"))], 4
    )
    sent = [(forward["all_to_all_single"], backward["all_to_all_single"]) for [(forward, backward)] in found]
    most, middle, least = 2 * M_and_S + S, M_and_S + S, 0
    assert sent == [(most, least), (most, middle), (middle, most), (least, most)]


def test_documents_that_end_at_the_edges_send_nothing():
    cases = [
        ((name, T, layout, DOCUMENTS[1]), options) for name, options in OPERATORS[:7] for layout in ("contiguous",)
    ]
    cases += [((name, T, "zigzag", [0, 24, 48, 72, T]), options) for name, options in OPERATORS[:7]]
    for found in run(context_operators.all_traffic, cases, 2):
        assert all(sent == returned == {} for sent, returned in found)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (("conv", 8, "contiguous"), {}, r"fragment length \(8 tokens / 4 fragments = 2\) must be at least"),
        (("conv", 97, "contiguous"), {}, r"sequence length \(97\) must be a positive multiple of the 4 fragments"),
        (("attention", T, "zigzag"), dict(window=97), r"window \(97\) must not exceed the sequence \(96 tokens\)"),
        (("attention", T, "zigzag"), dict(cp_comm_type="p2p"), r"cp_comm_type \(p2p\) must be 'all_gather' or 'a2a'"),
        (("gated delta", T, "zigzag"), dict(state_exchange="ring"), r"state_exchange \(ring\) must be 'all_gather' or"),
        (
            ("gated delta", T, "zigzag"),
            dict(backend="triton"),
            r"q \(torch.float64\) must be float32, bfloat16 or float16",
        ),
    ],
)
def test_what_cannot_be_exchanged_is_refused(arguments, options, message):
    for found in pool(4).run(context_operators.refusal, *arguments, groups=dict(context_parallel_size=4), **options):
        assert re.match(message, found), found


def test_kernels_are_tried_with_those_of_context_parallelism():
    """Where Triton's faults are unproven; a wrong map of a fragment shows in no output of one rank."""
    for found in pool(2).run(context_operators.trial, T, groups=dict(context_parallel_size=2)):
        assert found == ((1, 2), (8, 6), True, None, dict(has_state=True, maps=True))
