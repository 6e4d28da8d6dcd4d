"""Layers under context parallelism, also with tensor and sequence parallelism, against one rank."""

import re

import pytest

from tests.parallel import context_layers
from tests.ranks import pool

# float32: two orders of summing a few hundred terms, as in the tests of tensor parallelism.
TOLERANCE = 2e-5
PACKED = [0, 1, 9, 20, 36, 38, 72]
ROPE = dict(rotary_base=10000.0)
LAYERS = [
    ("G", {}),
    ("G", dict(state_exchange="scan", allow_neg_eigval=True)),
    ("M", {}),
    ("M", dict(overrides=dict(mamba_num_groups=1))),  # two tensor-parallel ranks share the group
    ("*", dict(window=7, rope=False)),
    ("*", dict(qk_norm=True, output_gate=True, rotary_percent=0.7, **ROPE)),
    ("*", dict(overrides=dict(cp_comm_type="a2a", rotary_interleaved=True), **ROPE)),
]
# Megatron's own rotary embedding, which it cuts for its zigzag batches.
GIVEN = dict(window=7, given=True)
LAYOUTS = [("contiguous", None), ("contiguous", PACKED), ("zigzag", PACKED), ("host", None)]


CASES = [((symbol, *layout), options) for symbol, options in LAYERS for layout in LAYOUTS]
CASES.append((("*", "host", None), GIVEN))


@pytest.fixture(scope="module")
def one_rank():
    """The result of each case on one rank; the layouts of a layer have it in common."""
    wanted = {}
    for (symbol, _, bounds), options in CASES:
        wanted.setdefault(str((symbol, bounds, options)), ((symbol, "contiguous", bounds), options))
    [found] = pool(1).run(context_layers.all_results, list(wanted.values()), groups={})
    results = dict(zip(wanted, found, strict=True))
    return [results[str((symbol, bounds, options))] for (symbol, _, bounds), options in CASES]


@pytest.mark.parametrize("tp, sequence_parallel", [(1, False), (2, False), (2, True)])
def test_layers_equal_one_rank(one_rank, tp, sequence_parallel):
    groups = dict(tensor_model_parallel_size=tp, context_parallel_size=4 // tp)
    for rank, found in enumerate(pool(4).run(context_layers.all_results, CASES, sequence_parallel, groups=groups)):
        for case, result, reference in zip(CASES, found, one_rank, strict=True):
            assert result.keys() == reference.keys()
            for name, value in reference.items():
                error = (result[name] - value).abs().max() / value.abs().max()
                assert error <= TOLERANCE, (rank, case, name, error)


@pytest.mark.parametrize(
    "symbol, layout, options, message",
    [
        ("*", "contiguous", dict(given=True), r"rotary_pos_emb \(the model's\) must be this layer's own with"),
        ("*", "host", dict(overrides=dict(cp_comm_type="p2p")), r"cp_comm_type \(p2p\) must be 'all_gather' or 'a2a'"),
        ("*", "host", dict(backend="te"), r"attention backend \(te\) must be another with context_parallel_size 2"),
        ("*", "host", dict(window=80, rope=False), r"window \(80\) must not exceed the sequence \(72 tokens\)"),
        (
            "*",
            "host",
            dict(overrides=dict(cp_comm_type="a2a", num_query_groups=1), **ROPE),
            r"num_query_groups \(1 on this tensor-parallel rank\) must be divisible by context_parallel_size \(2\)",
        ),
    ],
)
def test_what_attention_cannot_do_is_refused(symbol, layout, options, message):
    groups = dict(context_parallel_size=2)
    for found in pool(2).run(context_layers.refusal, symbol, layout, None, groups=groups, **options):
        assert re.match(message, found), found


def test_batches_of_others_are_refused():
    groups = dict(context_parallel_size=2)
    for found in pool(2).run(context_layers.packed_by_megatron, groups=groups):
        assert re.match(r"packed_seq_params \(qkv_format thd\) must be None or FragmentParams", found)
    for found in pool(2).run(context_layers.fragments_of_other_ranks, groups=groups):
        assert re.match(r"fragments \(of 1 ranks\) must be of the context-parallel group \(2 ranks\)", found)
