"""DeepSpeed's universal checkpoints: its own converter moves a run to other layouts; no file of it is executed."""

import contextlib
import importlib.util
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from megatron_gdn.config import ConfigError
from tests.ranks import RankError, pool
from tests.training import runs
from tests.training.test_deepspeed import assert_same_training, groups
from tests.training.test_engine import (
    SAMPLES,
    VOCABULARY,
    put_together,
    run_config,
    run_steps,
    stored_weights,
    train_steps,
)
from tests.training.test_pretrain import curve, failure, weights_and_moments

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="extra deepspeed")
H2 = dict(mamba_num_heads=4, mamba_head_dim=8, mamba_state_dim=16, mamba_num_groups=2)
IN_PROJ = "decoder.layers.1.self_attention.in_proj.weight"


def deepspeed(stage: int, parallel: dict | None = None, pattern: str = "M-G-*-", precision: str = "fp32", **model):
    engine = dict(name="deepspeed", zero_stage=stage)
    return run_config(pattern, parallel, dict(precision=precision), engine, **(H2 | model))


def build(config):
    from megatron_gdn.training.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine.build(config, vocab_size=VOCABULARY, device=torch.device("cpu"))


def stored_states(engine) -> dict[str, torch.Tensor]:
    """Float32 weights and moments by key on disk, whole."""
    with engine.gathered():
        state = engine.optimizer.sharded_state_dict(engine.model.sharded_state_dict(), is_loading=False, metadata={})
        return put_together(state["param_state"])


def first_steps(config, folder: Path) -> dict:
    """Two steps and a checkpoint of DeepSpeed's behind them."""
    engine = build(config)
    losses, norms = run_steps(engine, range(2))
    engine.save_deepspeed(folder / "two", {"step": 2})
    return dict(losses=losses, norms=norms, states=stored_states(engine))


def last_steps(config, folder: Path) -> dict:
    """Two steps more from the universal checkpoint."""
    engine = build(config)
    engine.load_universal(folder / "universal")
    assert engine.scheduler.num_steps == 2 * SAMPLES  # where the schedule is; the rate hardly moves in two steps
    states = stored_states(engine)
    losses, norms = run_steps(engine, range(2, 4))
    with engine.gathered():
        return dict(losses=losses, norms=norms, states=states, weights=stored_weights(engine.model))


def convert(folder: Path, name: str = "two") -> None:
    """As a user converts."""
    paths = ["--input_folder", str(folder / name), "--output_folder", str(folder / "universal")]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *paths, *workers]
    done = subprocess.run(command, env=os.environ | {"LOCAL_RANK": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(
    "first, second",
    [((1, dict(tensor=2, sequence=True)), (1, {})), ((1, {}), (2, dict(tensor=2))), ((2, dict(tensor=2)), (3, {}))],
    ids=["zero 1, tp 2 to 1", "zero 1, dp 2, to zero 2, tp 2", "zero 2, tp 2, to zero 3, dp 2"],
)
def test_a_universal_checkpoint_goes_to_another_layout(tmp_path, first, second):
    configs = [deepspeed(stage, parallel) for stage, parallel in (first, second)]
    whole = pool(2).run(train_steps, configs[0], 4, groups=groups(first[1]))[0]
    before = pool(2).run(first_steps, configs[0], tmp_path, groups=groups(first[1]))[0]
    convert(tmp_path)
    size = 1 if second == (1, {}) else 2
    for after in pool(size).run(last_steps, configs[1], tmp_path, groups=groups(second[1])):
        assert_equal_states(after["states"], before["states"])
        found = {name: before[name] + after[name] for name in ("losses", "norms")}
        assert_same_training(found | {"weights": after["weights"]}, whole)


def assert_equal_states(found: dict, expected: dict) -> None:
    """To the last bit: nothing is computed on the way."""
    assert found.keys() == expected.keys() and any("exp_avg_sq" in key for key in found)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_bf16_weights_keep_their_float32_masters(tmp_path):
    """At the same layout no bit differs; at another one the states are the same, and the losses as near as bf16 is."""
    config, other = deepspeed(1, precision="bf16"), deepspeed(2, dict(tensor=2), precision="bf16")
    whole = pool(2).run(train_steps, config, 4, groups={})[0]
    before = pool(2).run(first_steps, config, tmp_path, groups={})[0]
    convert(tmp_path)
    after = pool(2).run(last_steps, config, tmp_path, groups={})[0]
    assert_equal_states(after["states"], before["states"])
    masters = {key: value for key, value in before["states"].items() if ".param." in key}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in masters.values())
    assert all(value.dtype == torch.float32 for value in before["states"].values())
    for name in ("losses", "norms"):
        assert before[name] + after[name] == whole[name], name
    assert {value.dtype for value in whole["weights"].values()} == {torch.bfloat16, torch.float32}
    for key, weight in whole["weights"].items():
        assert torch.equal(after["weights"][key], weight), key
    for found in pool(2).run(last_steps, other, tmp_path, groups=groups(dict(tensor=2))):
        assert_equal_states(found["states"], before["states"])
        for a, b in zip(found["losses"], whole["losses"][2:], strict=True):
            assert abs(a - b) < 2e-3 * b  # the unit roundoff of bf16 is 4e-3, and a loss is a mean


def loaded_by_deepspeed(config, folder: Path) -> dict:
    """States that DeepSpeed's own loader takes from the checkpoint."""
    from unittest import mock

    from megatron_gdn.training.deepspeed_engine import _Groups

    engine = build(config)
    engine.optimizer._make_states()
    theirs = type(engine.wrapped)
    size = staticmethod(_Groups.get_model_parallel_world_size)  # by the name that this loader asks for
    with (
        mock.patch.object(theirs, "load_universal_checkpoint", lambda self: True),
        mock.patch.object(_Groups, "get_tensor_model_parallel_world_size", size, create=True),
    ):
        engine.wrapped.load_checkpoint(str(folder), "universal")
    return stored_states(engine)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint of two ranks, converted."""
    folder = tmp_path_factory.mktemp("made")
    pool(2).run(first_steps, deepspeed(1, dict(tensor=2), "*-G-"), folder, groups=groups(dict(tensor=2)))
    convert(folder)
    return folder


def load(config, folder: Path) -> dict:
    engine = build(config)
    engine.load_universal(folder / "universal")
    return stored_states(engine)


@pytest.mark.parametrize("tensor", [1, 2])
def test_deepspeeds_own_loader_takes_the_same(made, tensor):
    config, layout = deepspeed(1, dict(tensor=tensor), "*-G-"), groups(dict(tensor=tensor))
    expected = pool(tensor).run(loaded_by_deepspeed, config, made, groups=layout)[0]
    assert_equal_states(pool(tensor).run(load, config, made, groups=layout)[0], expected)


class Call:
    """Unpickled without restriction, it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def call_beside_values(path: Path, trap: Path) -> None:
    found = torch.load(path, weights_only=False)  # this test's own
    torch.save(found | {"more": Call(trap)} if isinstance(found, dict) else [found, Call(trap)], path)


def only_a_call(path: Path, trap: Path) -> None:
    torch.save(Call(trap), path)


def call_in_the_old_format(path: Path, trap: Path) -> None:
    torch.save(Call(trap), path, _use_new_zipfile_serialization=False)


def pickled_call(path: Path, trap: Path) -> None:
    path.write_bytes(pickle.dumps(Call(trap)))


HOSTILE = [call_beside_values, only_a_call, call_in_the_old_format, pickled_call]
READ = ["mp_rank_00_model_states.pt", *(f"zero/{IN_PROJ}/{n}.pt" for n in ("fp32", "exp_avg", "exp_avg_sq", "step"))]


@pytest.fixture
def universal(made, tmp_path):
    shutil.copytree(made / "universal", tmp_path / "universal")
    return tmp_path / "universal"


def refused(universal: Path, config=None) -> str:
    with pytest.raises(RankError) as error:
        pool(1).run(load, config or deepspeed(1, {}, "*-G-"), universal.parent, groups={})
    return str(error.value)


@pytest.mark.parametrize("write", HOSTILE)
@pytest.mark.parametrize("name", READ)
def test_a_hostile_file_is_refused(universal, tmp_path, name, write):
    write(universal / name, tmp_path / "trap")
    error = refused(universal)
    path = re.escape(str(universal / name))
    assert re.search(rf"cannot read {re.escape(str(universal))}: rank 0: .*{path} ", error), error
    if write in (call_beside_values, only_a_call):
        assert re.search(r"is refused: .*mkdir.*: do not load it\.", error), error
    else:
        assert "copy it whole" in error
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("write", HOSTILE)
def test_files_that_are_not_read_run_nothing(made, universal, tmp_path, write):
    """DeepSpeed's loader takes them all."""
    (universal / "zero" / IN_PROJ / "more.pt").touch()
    others = [f"zero/{IN_PROJ}/more.pt", "zero/optimizer_state.pt", "mp_rank_01_model_states.pt", "latest"]
    for name in others:
        (pickled_call if write is call_beside_values else write)(universal / name, tmp_path / "trap")
    expected = pool(1).run(load, deepspeed(1, {}, "*-G-"), made, groups={})[0]
    assert_equal_states(pool(1).run(load, deepspeed(1, {}, "*-G-"), tmp_path, groups={})[0], expected)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("write", HOSTILE)
def test_the_trap_works(universal, tmp_path, write):
    """Without restriction the files of these tests do make the folder."""
    write(universal / READ[0], tmp_path / "trap")
    with contextlib.suppress(RuntimeError):  # a bare pickle is no file of torch.save, which it finds out too late
        torch.load(universal / READ[0], weights_only=False)
    assert (tmp_path / "trap").is_dir()


def change(path: Path, **values) -> None:
    torch.save(torch.load(path, weights_only=False) | values, path)


def other_order(path: Path) -> None:
    found = torch.load(path, weights_only=False)
    found["sub_param_shape"].shape = ((32, 32, 16, 64), 32)
    torch.save(found, path)


@pytest.mark.parametrize(
    "name, damage, message",
    [
        (READ[0], Path.unlink, r"cannot be read \(FileNotFoundError.*name the output folder of deepspeed.checkpoint"),
        (READ[0], lambda path: torch.save({"schedule": {}}, path), "must hold schedule and info: write it with"),
        (READ[1], lambda path: path.write_bytes(path.read_bytes()[:900]), r"cannot be read \(RuntimeError.*copy it"),
        (READ[1], lambda path: torch.save([1], path), "must hold a tensor 'param': convert the checkpoint anew"),
        (
            READ[2],
            lambda path: change(path, param=torch.zeros(96, 32)),
            r"exp_avg.pt \(torch.float32, \[96, 32\]\) must be torch.float32, \[128, 32\]: continue with the model",
        ),
        (
            READ[3],
            lambda path: change(path, param=torch.zeros(128, 32).bfloat16()),
            r"exp_avg_sq.pt \(torch.bfloat16, \[128, 32\]\) must be torch.float32",
        ),
        (READ[1], other_order, r"has sections of \(32, 32, 16, 64\) rows and the model of \(16, 16, 48, 48\)"),
        (READ[4], lambda path: torch.save(torch.tensor(3.0), path), r"\(2 updates\) must be 3 as in .*|\(3 updates\)"),
        (READ[4], lambda path: torch.save([2], path), "must hold a number of updates: convert the checkpoint anew"),
    ],
    ids=lambda value: value if isinstance(value, str) and "/" in value else "",
)
def test_a_damaged_file_is_refused(universal, name, damage, message):
    damage(universal / name)
    error = refused(universal)
    assert re.search(message, error) and str(universal / name) in error, error


def test_the_checkpoint_of_another_model_is_refused(universal):
    assert "cannot be read (FileNotFoundError" in refused(universal, deepspeed(1, {}, "*-G-G-"))


def refusals(config, folder: Path) -> list[str]:
    """What saving, building for it and loading say."""
    engine, found = build(config), []
    for call in (lambda: engine.save_deepspeed(folder / "two", {}), lambda: engine.load_universal(folder / "two")):
        with pytest.raises(ConfigError) as error:
            call()
        found.append(str(error.value))
    config.checkpoint.deepspeed = True
    with pytest.raises(ConfigError) as error:
        build(config)
    return [*found, str(error.value)]


@pytest.mark.parametrize(
    "model",
    [
        dict(pattern="G-", linear_num_key_heads=3, linear_num_value_heads=3),
        dict(pattern="*-", num_attention_heads=6, num_query_groups=3, kv_channels=8),
    ],
    ids=["heads of Gated DeltaNet", "heads of attention"],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, model):
    message = "decoder.layers.0.self_attention holds ghost heads or filled-up rows at parallel.tensor=2"
    config = deepspeed(1, dict(tensor=2), **model)
    for found in pool(2).run(refusals, config, tmp_path, groups=groups(dict(tensor=2))):
        assert len(found) == 3 and all(text.startswith(message) for text in found)
    assert not list(tmp_path.iterdir())


def saved_at_zero_3(config, folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        build(config).save_deepspeed(folder / "two", {})
    return str(error.value)


def test_zero_3_writes_none(tmp_path):
    [found] = pool(1).run(saved_at_zero_3, deepspeed(3), tmp_path, groups={})
    assert found.startswith("engine.zero_stage (3) must be 1 or 2 to write DeepSpeed's own checkpoint: use one of them")


@pytest.mark.parametrize(
    "engine, checkpoint, message",
    [
        ({}, dict(deepspeed=True), r"checkpoint.deepspeed \(True\) needs engine.name=deepspeed and has megatron"),
        ({}, dict(initial_universal="x"), r"checkpoint.initial_universal \(x\) needs engine.name=deepspeed"),
        (
            dict(name="deepspeed", zero_stage=3),
            dict(deepspeed=True),
            r"engine.zero_stage \(3\) must be 1 or 2 with checkpoint.deepspeed: use one of them",
        ),
        (
            dict(name="deepspeed"),
            dict(initial_universal="x", initial_weights="y"),
            r"initial_weights \(y\) and initial_universal \(x\) must not both be set",
        ),
    ],
)
def test_settings_that_cannot_work(tmp_path, engine, checkpoint, message):
    from megatron_gdn.config import parse_config

    values = runs.settings(tmp_path / "text", tmp_path / "run", engine=engine, checkpoint=checkpoint)
    with pytest.raises(ConfigError, match=message):
        parse_config(values)


def test_a_run_goes_on_in_another_folder(tmp_path):
    """As a user moves it: DeepSpeed's checkpoint of what is there, convert, start a new run at another stage."""
    prefix = runs.write_dataset(tmp_path)
    options = dict(engine=dict(name="deepspeed", zero_stage=1))
    runs.run(runs.settings(prefix, tmp_path / "whole", **options))
    half = dict(training={"exit_after_steps": 5})
    runs.run(runs.settings(prefix, tmp_path / "half", **options, **half))
    # Of a run that ended without: there is no step left to do, and the checkpoint is all that is written.
    runs.run(runs.settings(prefix, tmp_path / "half", **options, **half, checkpoint={"deepspeed": True}), resume=True)
    folder = tmp_path / "half" / "deepspeed"
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["step_00000005"]
    convert(folder, "step_00000005")
    options = dict(engine=dict(name="deepspeed", zero_stage=2))
    values = dict(checkpoint={"initial_universal": str(folder / "universal")})
    runs.run(runs.settings(prefix, tmp_path / "rest", **options, **values))
    whole, rest = curve(tmp_path / "whole"), curve(tmp_path / "rest")
    assert not any(rest.pop(5))  # says only that it was continued
    assert list(rest) == [6, 7, 8, 9, 10] and rest == {step: whole[step] for step in rest}
    ours, theirs = (weights_and_moments(tmp_path / name) for name in ("rest", "whole"))
    assert_equal_states(ours, theirs)


def test_another_run_is_not_continued(tmp_path):
    """What cannot be continued is told before anything is taken; a hostile file too."""
    prefix = runs.write_dataset(tmp_path)
    options = dict(engine=dict(name="deepspeed"))
    runs.run(
        runs.settings(
            prefix, tmp_path / "a", **options, training={"exit_after_steps": 1}, checkpoint={"deepspeed": True}
        )
    )
    folder = tmp_path / "a" / "deepspeed" / "step_00000001"  # before conversion it has the file of the progress
    (folder / "zero").mkdir()
    values = dict(checkpoint={"initial_universal": str(folder)}, optimizer={"lr": 2e-2})
    error = failure(runs.settings(prefix, tmp_path / "b", **options, **values))
    assert "optimizer.lr: 0.01 in the checkpoint, 0.02 now" in error
    only_a_call(folder / READ[0], tmp_path / "trap")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(runs.settings(prefix, tmp_path / "c", **options, **values)))
    command = [sys.executable, "examples/pretrain.py", "--config", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True)
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.fullmatch(rf"error: {folder / READ[0]} is refused: .*mkdir.*: do not load it\.", error), error
    assert not (tmp_path / "trap").exists()
