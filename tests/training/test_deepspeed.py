"""The engine deepspeed against the engine megatron: losses, gradient norms, weights, and each other's checkpoints."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from megatron_gdn.config import ConfigError
from megatron_gdn.training.deepspeed_config import deepspeed_config
from tests.ranks import pool
from tests.training.test_engine import VOCABULARY, run_config, run_steps, stored_weights, train_steps

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="extra deepspeed")
LAYOUTS = {
    "tp2": (2, dict(tensor=2, sequence=True)),
    "dp2": (2, {}),
    "tp2 dp2": (4, dict(tensor=2, sequence=True)),
    "cp2": (2, dict(context=2, context_layout="zigzag")),
}


def deepspeed(stage: int, parallel: dict | None = None, **training):
    return run_config("G-*-", parallel=parallel, training=training, engine=dict(name="deepspeed", zero_stage=stage))


def megatron(parallel: dict | None = None, **training):
    return run_config("G-*-", parallel=parallel, training=training)


def groups(parallel: dict) -> dict:
    sizes = dict(tensor=parallel.get("tensor", 1), context=parallel.get("context", 1))
    return dict(tensor_model_parallel_size=sizes["tensor"], context_parallel_size=sizes["context"])


def assert_same_training(found: dict, expected: dict) -> None:
    """Sums run in other orders: 1e-5 of losses and norms; the update follows, at lr 3e-3."""
    for name in ("losses", "norms"):
        for a, b in zip(found[name], expected[name], strict=True):
            assert abs(a - b) <= 1e-5 * abs(b), name
    assert found["weights"].keys() == expected["weights"].keys()
    for key, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][key], weight, rtol=0, atol=1e-5, msg=key)


@pytest.fixture(scope="module")
def one_process():
    return pool(1).run(train_steps, megatron(), groups={})[0]


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_equals_the_engine_megatron(one_process, layout, stage):
    size, parallel = LAYOUTS[layout]
    results = pool(size).run(train_steps, deepspeed(stage, parallel), groups=groups(parallel))
    for found in results:
        assert_same_training(found, one_process)


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_states_on_the_cpu_change_nothing(one_process, stage):
    """Offloading on a machine whose device is the CPU: DeepSpeed's path of it, with PyTorch's AdamW."""
    config = deepspeed(stage)
    config.engine.offload_optimizer = True
    for found in pool(2).run(train_steps, config, groups={}):
        assert_same_training(found, one_process)


def two_steps(config, folder: str, *, resume: bool) -> dict:
    """Steps 0 and 1 with a checkpoint behind them, or steps 2 and 3 from the checkpoint there."""
    from megatron_gdn.training.checkpoint import CheckpointStore
    from megatron_gdn.training.data import Vocabulary
    from megatron_gdn.training.loop import engine_type
    from megatron_gdn.training.state import TrainState

    engine = engine_type(config).build(config, vocab_size=VOCABULARY, device=torch.device("cpu"))
    parts = {name: getattr(engine, name) for name in ("model", "optimizer", "scheduler", "gathered")}
    state = TrainState(vocabulary=Vocabulary(size=VOCABULARY, eod_id=0), data_key="", **parts)
    store = CheckpointStore(Path(folder))
    if resume:
        assert state.load(store, config)
    losses, norms = run_steps(engine, range(state.step, state.step + 2))
    engine.sync_parameters()
    if not resume:
        state.step = 2
        state.save(store, config)
    with engine.gathered():
        return dict(losses=losses, norms=norms, weights=stored_weights(engine.model))


def continued(first, second, folder: Path, sizes: tuple[int, int] = (2, 2)) -> dict:
    """Two steps with the first configuration and two more, from its checkpoint, with the second."""
    results = []
    for i, config in enumerate((first, second)):
        layout = groups(dict(tensor=config.parallel.tensor))
        results.append(pool(sizes[i]).run(two_steps, config, str(folder), resume=i == 1, groups=layout)[0])
    return results[1] | {name: results[0][name] + results[1][name] for name in ("losses", "norms")}


@needs_deepspeed
@pytest.mark.parametrize(
    "first, second, sizes",
    [
        (deepspeed(1), megatron(), (2, 2)),
        (megatron(), deepspeed(1), (2, 2)),
        (deepspeed(3), deepspeed(0), (2, 1)),
        (deepspeed(1, dict(tensor=2)), deepspeed(2), (2, 1)),
        (deepspeed(2), deepspeed(3, dict(tensor=2, sequence=True)), (1, 2)),
    ],
    ids=["zero 1 to megatron", "megatron to zero 1", "zero 3 to 0, dp 2 to 1", "tp 2 to 1", "zero 2 to 3, tp 1 to 2"],
)
def test_either_engine_continues_what_the_other_saved(tmp_path, first, second, sizes):
    expected = pool(2).run(train_steps, megatron(), 4, groups={})[0]
    assert_same_training(continued(first, second, tmp_path, sizes), expected)


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 3])
def test_resumed_at_the_same_layout_nothing_differs(tmp_path, stage):
    whole = pool(2).run(train_steps, deepspeed(stage), 4, groups={})[0]
    parts = continued(deepspeed(stage), deepspeed(stage), tmp_path)
    assert parts["losses"] == whole["losses"] and parts["norms"] == whole["norms"]
    assert all(torch.equal(parts["weights"][key], weight) for key, weight in whole["weights"].items())


@needs_deepspeed
def test_bf16_keeps_gates_in_float32_and_stays_near_megatron():
    ours, theirs = (
        pool(2).run(train_steps, config, groups={})[0]
        for config in (deepspeed(1, precision="bf16"), megatron(precision="bf16"))
    )
    for a, b in zip(ours["losses"], theirs["losses"], strict=True):
        assert abs(a - b) < 2e-3 * b  # DeepSpeed adds gradients of passes in other precision than Megatron
    for key, weight in ours["weights"].items():
        assert weight.dtype == theirs["weights"][key].dtype, key
    assert {ours["weights"][k].dtype for k in ours["weights"] if k.endswith(("A_log", "dt_bias"))} == {torch.float32}


def users_file(folder: Path, text: str) -> str:
    path = folder / "ds_config.json"
    path.write_text(text)
    return str(path)


def test_a_user_s_configuration_adds_what_the_recipe_does_not_say(tmp_path):
    config = deepspeed(1)
    users = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 5000},
        "zero_force_ds_cpu_optimizer": True,
        "fp16": {"enabled": False},
        "steps_per_print": 7,
    }
    plain = deepspeed_config(config, 2)
    assert plain["gradient_accumulation_steps"] == 2 and plain["zero_optimization"] == {"stage": 1}
    config.engine.deepspeed_config = users_file(tmp_path, json.dumps(users))
    merged = deepspeed_config(config, 2)
    assert merged == plain | {
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 5000},
        "zero_force_ds_cpu_optimizer": True,
        "fp16": {"enabled": False},
        "steps_per_print": 7,
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"gradient_clipping": 1.0}', r"gradient_clipping: 1.0 there, 0.5 in the recipe"),
        ('{"train_batch_size": 16}', r"train_batch_size: 16 there, 8 in the recipe"),
        ('{"zero_optimization": {"stage": 2}}', r"zero_optimization.stage: 2 there, 1 in the recipe"),
        ('{"optimizer": {"type": "Adam"}}', r"optimizer: leave it out, the recipe's optimizer section sets it"),
        ('{"fp16": {"enabled": true}}', r"fp16: leave it out, training.precision=bf16 or fp32 sets it"),
        ("{", r"ds_config.json\) cannot be read as JSON"),
        ("[]", r"must hold an object"),
        ('{"zero_optimization": 2}', r"zero_optimization: 2 there, which must be an object"),
        ('{"fp16": true}', r"fp16: leave it out"),
    ],
)
def test_a_user_s_configuration_that_disagrees_is_refused(tmp_path, text, message):
    config = deepspeed(1)
    config.engine.deepspeed_config = users_file(tmp_path, text)
    with pytest.raises(ConfigError, match=message):
        deepspeed_config(config, 2)


def test_offloading_is_passed_on_and_wants_pytorch_s_adamw(tmp_path):
    config = deepspeed(2)
    config.engine.offload_optimizer = True
    assert deepspeed_config(config, 2)["zero_optimization"] == {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    users = {"zero_optimization": {"offload_optimizer": {"pin_memory": True}}}
    config.engine.deepspeed_config = users_file(tmp_path, json.dumps(users))
    merged = deepspeed_config(config, 2)["zero_optimization"]
    assert merged["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    config.engine.deepspeed_config = users_file(tmp_path, '{"zero_force_ds_cpu_optimizer": true}')
    with pytest.raises(ConfigError, match=r"true there, and PyTorch's AdamW updates offloaded states: use false"):
        deepspeed_config(config, 2)


@pytest.mark.parametrize(
    "engine, parallel, message",
    [
        ({"name": "deepspeed"}, {"pipeline": 2}, r"parallel.pipeline \(2\) must be 1 with engine.name=deepspeed"),
        ({"deepspeed_config": "x.json"}, {}, r"deepspeed_config \(x.json\) needs name deepspeed"),
        (
            {"name": "deepspeed", "zero_stage": 0, "offload_optimizer": True},
            {},
            r"offload_optimizer \(true\) needs zero_stage 1 to 3 and has 0",
        ),
        (
            {"zero_stage": 3, "offload_optimizer": True},
            {},
            r"zero_stage \(3\), offload_optimizer \(true\) needs name deepspeed and has megatron",
        ),
        ({"name": "deepspeed", "zero_stage": 4}, {}, r"engine.zero_stage \(4\): input should be less than or equal"),
    ],
)
def test_settings_that_cannot_work(engine, parallel, message):
    with pytest.raises(ConfigError, match=message):
        run_config("G-*-", parallel=parallel, engine=engine)
