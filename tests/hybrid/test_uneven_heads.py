"""Heads that tensor parallelism does not divide, in all mixers at once: the steps and checkpoints of one rank."""

import pytest
import torch

from tests.ranks import pool
from tests.training.test_engine import VOCABULARY, compare, run_config, stored_weights, train_steps

# The paper's 9 heads in Gated DeltaNet, here in attention and Mamba2 too; 24 divides TP 8 in the MLP.
NINE = dict(
    pattern="M-G-S-",
    hidden_size=36,
    linear_num_key_heads=9,
    linear_num_value_heads=9,
    linear_key_head_dim=4,
    linear_value_head_dim=6,
    num_attention_heads=9,
    num_query_groups=9,
    sliding_attention=dict(window=20),
    mamba_num_heads=9,
    mamba_head_dim=4,
    mamba_state_dim=8,
)
# Two query heads and their gates on each of three key heads, with norms.
GROUPED = dict(
    pattern="*-G",
    num_attention_heads=6,
    num_query_groups=3,
    kv_channels=8,
    linear_num_key_heads=3,
    linear_num_value_heads=6,
    full_attention=dict(rotary_percent=0.5, qk_norm=True, output_gate=True),
    zero_centered_norm=True,
)
# Ranks share the one key head; each has its query heads and their gates.
SHARED = dict(
    pattern="*-",
    num_query_groups=1,
    full_attention=dict(qk_norm=True, output_gate=True),
)
MODELS = {"nine": NINE, "grouped": GROUPED, "shared": SHARED}


@pytest.fixture(scope="module")
def one_rank():
    return {name: pool(1).run(train_steps, run_config(**model), groups={})[0] for name, model in MODELS.items()}


@pytest.mark.parametrize(
    "name, tensor, sequence",
    [
        ("nine", 2, False),
        ("nine", 4, True),
        ("nine", 8, True),
        ("grouped", 2, True),
        ("grouped", 4, False),
        ("shared", 2, True),
    ],
)
def test_steps_equal_one_rank(one_rank, name, tensor, sequence):
    """Losses, gradient norms and weights on disk of three steps."""
    config = run_config(parallel=dict(tensor=tensor, sequence=sequence), **MODELS[name])
    groups = dict(tensor_model_parallel_size=tensor)
    for result in pool(tensor).run(train_steps, config, groups=groups, timeout_s=300.0):
        compare(result, one_rank[name])


def save_or_load(config, folder, save: bool):
    """Weights on disk of a model that was saved, or that started from others and was loaded."""
    from megatron_gdn.training import torch_dist
    from megatron_gdn.training.engine import MegatronEngine

    config.run.seed += 0 if save else 1
    model = MegatronEngine.build(config, vocab_size=VOCABULARY, device=torch.device("cpu")).model
    before = stored_weights(model)
    if save:
        if torch.distributed.get_rank() == 0:
            folder.mkdir()
        torch.distributed.barrier()
        torch_dist.write(model.sharded_state_dict(), folder)
        return before
    model.load_state_dict(torch_dist.read(model.sharded_state_dict(), folder))
    after = stored_weights(model)
    assert not torch.equal(before["output_layer.weight"], after["output_layer.weight"])
    return after


@pytest.mark.parametrize("save, load", [(4, 1), (1, 2), (2, 4)])
def test_checkpoints_fit_every_number_of_ranks(tmp_path, save, load):
    configs = {tp: run_config(parallel=dict(tensor=tp), **NINE) for tp in (save, load)}
    groups = {tp: dict(tensor_model_parallel_size=tp) for tp in (save, load)}
    [saved, *_] = pool(save).run(save_or_load, configs[save], tmp_path / "model", True, groups=groups[save])
    for loaded in pool(load).run(save_or_load, configs[load], tmp_path / "model", False, groups=groups[load]):
        assert saved.keys() == loaded.keys()
        for key, weight in saved.items():
            assert torch.equal(weight, loaded[key]), key
    assert saved["decoder.layers.2.self_attention.linear_qkv.weight"].shape == (3 * 36, 36)
    assert saved["decoder.layers.2.self_attention.linear_proj.weight"].shape == (36, 36)
