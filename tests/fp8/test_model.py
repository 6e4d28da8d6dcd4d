"""Which parts of a model run in FP8, and that a model in emulated FP8 trains like one without, at every layout."""

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megatron_gdn.fp8.linear import FP8ColumnParallelLinear, FP8RowParallelLinear
from tests.ranks import pool
from tests.training.test_engine import VOCABULARY, run_config, train_steps

# Widths are multiples of 16 on two ranks; two edge layers stay as they are.
SIZES = dict(
    hidden_size=32,
    ffn_hidden_size=64,
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=24,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=16,
    mamba_num_heads=4,
    mamba_head_dim=16,
    mamba_state_dim=16,
    mamba_num_groups=2,
    sliding_attention={"window": 20},
)
LAYERS = {"G": {"in_proj", "out_proj"}, "S": {"linear_qkv", "linear_proj"}, "M": {"in_proj", "out_proj"}}


def fp8_config(recipe: str, pattern: str = "G-M-G-S-G-", precision: str = "fp32", parallel: dict | None = None):
    config = run_config(pattern, parallel=parallel, training=dict(precision=precision, sequence_length=72), **SIZES)
    if recipe != "none":
        config.fp8.recipe, config.fp8.backend = recipe, "emulated"
    config.fp8.__post_init__()
    return config


def linear_layers():
    """Type and weight dtype of every linear layer, and dtypes of the parameters of gates, by name."""
    from megatron_gdn.training.engine import MegatronEngine

    engine = MegatronEngine.build(
        fp8_config("tensorwise", precision="bf16"), vocab_size=VOCABULARY, device=torch.device("cpu")
    )
    modules = {name: module for name, module in engine.model.named_modules()}
    kinds = (ColumnParallelLinear, RowParallelLinear)
    gates = {n: p.dtype for n, p in engine.model.named_parameters() if n.endswith(("A_log", "dt_bias"))}
    filled = modules["decoder.layers.2.self_attention"].in_proj.weight.shape
    return {n: type(m).__name__ for n, m in modules.items() if isinstance(m, kinds)}, gates, tuple(filled)


def test_large_products_of_inner_layers_are_in_fp8_and_nothing_else():
    types, gates, filled = pool(1).run(linear_layers, groups={})[0]
    expected = {"output_layer": "ColumnParallelLinear"}
    for i, symbol in enumerate("GMGSG"):
        names = {f"self_attention.{name}" for name in LAYERS[symbol]} | {"mlp.linear_fc1", "mlp.linear_fc2"}
        for name in names:
            kind = "Row" if name.endswith(("out_proj", "linear_proj", "linear_fc2")) else "Column"
            prefix = "FP8" if 0 < i < 4 else ""
            expected[f"decoder.layers.{i}.{name}"] = f"{prefix}{kind}ParallelLinear"
        for gate in {"G": ["in_proj_ba"], "M": ["in_proj_dt"], "S": []}[symbol]:
            expected[f"decoder.layers.{i}.self_attention.{gate}"] = "ColumnParallelLinear"
    assert types == expected
    assert {FP8ColumnParallelLinear.__name__, FP8RowParallelLinear.__name__} < set(types.values())
    assert len(gates) == 8 and set(gates.values()) == {torch.float32}
    assert filled == (160, 32)  # 2 * (16 + 16 + 24 + 24), a multiple of 32 by itself


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_training_steps_stay_near_those_without(recipe):
    steps = 4
    exact, rounded = (pool(1).run(train_steps, fp8_config(name), steps, groups={})[0] for name in ("none", recipe))
    assert exact["losses"] != rounded["losses"]
    for a, b in zip(exact["losses"], rounded["losses"], strict=True):
        assert abs(a - b) < 0.02 * a  # three of five layers round their operands by some percent
    for a, b in zip(exact["norms"][1:], rounded["norms"][1:], strict=True):
        assert abs(a - b) < 0.15 * a


def test_tensor_parallel_ranks_scale_their_own_shards_and_stay_near_one_rank():
    one = pool(1).run(train_steps, fp8_config("tensorwise"), groups={})[0]
    parallel = dict(tensor=2, sequence=True)
    two = pool(2).run(
        train_steps, fp8_config("tensorwise", parallel=parallel), groups=dict(tensor_model_parallel_size=2)
    )
    assert two[0]["losses"] == two[1]["losses"]
    for a, b in zip(one["losses"], two[0]["losses"], strict=True):
        assert abs(a - b) < 0.01 * a
