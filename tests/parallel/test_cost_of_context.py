"""Bytes between context-parallel ranks: what cost.py says is what the layers send, and it does not grow with T."""

import pytest

from megatron_gdn.cost import model_cost
from megatron_gdn.layer_cost import head_exchange_bytes
from tests.parallel.layer_traffic import all_layers
from tests.ranks import pool
from tests.training.test_engine import run_config

RANKS = 4
NAMES = {"G": "Gated DeltaNet", "M": "Mamba2", "S": "sliding-window attention", "*": "full attention"}
LENGTHS = (256, 1024)
MODEL = dict(
    pattern="GMS*",
    linear_num_key_heads=4,
    linear_num_value_heads=8,
    num_query_groups=4,
    mamba_num_heads=4,
    mamba_head_dim=16,
    mamba_state_dim=8,
    sliding_attention={"window": 30},
)
CASES = {
    "contiguous": {},
    "zigzag": {"context_layout": "zigzag"},
    "attention by heads": {"context_attention": "a2a"},
    "states by a scan": {"state_exchange": "scan"},
}


def config_of(case: str, length: int):
    parallel = {"context": RANKS} | CASES[case]
    training = dict(sequence_length=length, micro_batch_size=1)
    return run_config(parallel=parallel, training=training, **MODEL)


@pytest.fixture(scope="module")
def counted():
    """By case and length: what the rank that sends most sends, by symbol."""
    keys = [(case, length) for case in CASES for length in LENGTHS]
    groups = dict(context_parallel_size=RANKS)
    ranks = pool(RANKS).run(all_layers, [config_of(*key) for key in keys], "GMS*", groups=groups)
    return {
        key: {symbol: tuple(max(rank[i][symbol][way] for rank in ranks) for way in range(2)) for symbol in ranks[0][i]}
        for i, key in enumerate(keys)
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("symbol", NAMES)
def test_bytes_are_those_counted(counted, case, symbol):
    for length in LENGTHS:
        config = config_of(case, length)
        [layer] = {x.name: x for x in model_cost(config, vocab_size=250).layers if x.name == NAMES[symbol]}.values()
        assert counted[case, length][symbol] == layer.context_bytes, length
        expected = head_exchange_bytes(config)
        assert counted[case, length]["heads"] == (expected, expected)


@pytest.mark.parametrize("case", CASES)
def test_only_what_sees_all_tokens_grows_with_the_sequence(counted, case):
    short, long = (counted[case, length] for length in LENGTHS)
    for symbol in "GMS":
        assert short[symbol] == long[symbol] and min(short[symbol]) > 0
    for symbol in ("*", "heads"):
        assert all(4 * a == b for a, b in zip(short[symbol], long[symbol], strict=True))


def test_one_rank_sends_nothing():
    cost = model_cost(run_config(**MODEL), vocab_size=250)
    assert {layer.context_bytes for layer in cost.layers} == {(0.0, 0.0)}


def test_a_step_sends_what_its_layers_and_sequences_send():
    parallel, training = dict(context=4), dict(recompute="full", sequence_length=64)
    config = run_config(pattern="G-G-", parallel=parallel, training=training)
    cost = model_cost(config, vocab_size=250, data_parallel=2)
    # H = 2, HV = 4, K = 8, V = 12, in float32: three others get the maps and states twice, as the forward pass runs
    # again, and gradients of states; and the next rank gets three rows of 2 H K + HV V, and sends their gradients.
    per_layer = 3 * 4 * (4 * 8 * 8 + 4 * 8 * 12) * 2 + 3 * 4 * (4 * 8 * 12) + 3 * 3 * 4 * (2 * 2 * 8 + 4 * 12)
    assert cost.communication_bytes(0)["context"] == 2 * (8 // 2) * per_layer
    data = cost.communication_bytes(0)["data"]
    assert data == sum(x.rank_parameters for x in cost.layers) * (4 + 4) * 7 / 8  # gradients over DP 2 x CP 4
