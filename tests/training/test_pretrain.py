"""Whole runs: stopped, killed, resumed, at another layout, with wrong inputs. Each compares with an undisturbed run."""

import json
import os
import random
import re
import shutil
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from megatron_gdn.config import ConfigError, parse_config
from megatron_gdn.training.metrics import read_metrics
from tests.training import runs

STEPS = 10
# Values that a step determines; times and speeds differ from run to run.
NUMBERS = ("train/loss", "train/grad_norm", "train/lr", "validation/loss", "progress/samples")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    return runs.write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(prefix, tmp_path_factory):
    """One process, ten steps in one go."""
    output_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    runs.run(runs.settings(prefix, output_dir))
    return output_dir


def curve(output_dir: Path) -> dict[int, tuple]:
    rows = read_metrics(output_dir / "metrics.jsonl")
    return {row["step"]: tuple(row.get(name) for name in NUMBERS) for row in rows}


def weights_and_moments(output_dir: Path, step: int = STEPS) -> dict:
    """Every tensor of a checkpoint, read by torch's own reader without Megatron."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    path = output_dir / f"checkpoints/step_{step:08d}"
    reader = dcp.FileSystemReader(path)
    import torch

    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    return tensors


def assert_same_run(output_dir, reference, step: int = STEPS):
    """The same curves and the same checkpoint, to the last bit."""
    import torch

    assert curve(output_dir) == curve(reference)
    ours, theirs = weights_and_moments(output_dir, step), weights_and_moments(reference, step)
    assert ours.keys() == theirs.keys() and any("exp_avg_sq" in name for name in ours)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_training_learns(undisturbed):
    losses = curve(undisturbed)
    assert list(losses) == list(range(STEPS + 1))
    assert losses[STEPS][3] < losses[0][3] - 0.2


def test_stop_and_resume_equals_one_go(prefix, undisturbed, tmp_path):
    values = runs.settings(prefix, tmp_path / "run", training={"exit_after_steps": 5})
    runs.run(values)
    assert list(curve(tmp_path / "run")) == list(range(6))
    runs.run(runs.settings(prefix, tmp_path / "run"), resume=True)
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGUSR1"])
def test_signal_saves_and_ends_with_success(prefix, undisturbed, tmp_path, signal_name):
    values = runs.settings(prefix, tmp_path / "run", checkpoint={"interval": None})
    [process] = runs.start(values)
    wait_for(tmp_path / "run/metrics.jsonl", '"step": 2')
    os.kill(process.pid, getattr(signal, signal_name))
    process.join(60)
    assert process.exitcode == 0
    steps = [int(path.name[5:]) for path in (tmp_path / "run/checkpoints").iterdir()]
    assert len(steps) == 1 and 2 <= steps[0] <= STEPS
    runs.run(values, resume=True)
    assert_same_run(tmp_path / "run", undisturbed)


def wait_for(path: Path, text: str, timeout_s: float = 60.0):
    deadline = time.monotonic() + timeout_s
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < deadline, f"{text} did not appear in {path}"
        time.sleep(0.01)


FAILPOINTS = ["prepared:2", "shards:3", "manifest:2", "rename:3", "renamed:2", "prune:1"]


def test_kill_inside_a_save_loses_nothing(prefix, undisturbed, tmp_path):
    """SIGKILL at named points inside a save; the run that is resumed after each equals the undisturbed one."""
    values = runs.settings(prefix, tmp_path / "run", checkpoint={"interval": 1, "keep": 2})
    for i, failpoint in enumerate(FAILPOINTS):
        [process] = runs.start(values, resume=i > 0, environment={"MEGATRON_GDN_FAILPOINT": failpoint})
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, failpoint
    runs.run(values, resume=True)
    assert_same_run(tmp_path / "run", undisturbed)


def files_under_way(output_dir: Path) -> set[Path]:
    """Files of checkpoints that are not complete."""
    try:
        return set((output_dir / "checkpoints").glob(".writing-*/*"))
    except FileNotFoundError:  # complete in the meantime
        return set()


def test_kill_at_random_moments_loses_nothing(prefix, undisturbed, tmp_path):
    """SIGKILL while saves are under way, six times; every step is saved, so a save is nearly always under way."""
    rng = random.Random(0)
    values = runs.settings(prefix, tmp_path / "run", checkpoint={"interval": 1, "keep": 2})
    exit_codes = []
    while len(exit_codes) < 6:
        [process] = runs.start(values, resume=len(exit_codes) > 0)
        before = files_under_way(tmp_path / "run")
        deadline = time.monotonic() + 60
        while files_under_way(tmp_path / "run") <= before and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.join()
        exit_codes.append(process.exitcode)
    # The last one may have come to the end of the run before it was killed.
    assert exit_codes[:5] == [-signal.SIGKILL] * 5
    runs.run(values, resume=True)
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.parametrize(
    "before, after, replicas",
    [
        (dict(tensor=2, sequence=True), dict(), 1),
        (dict(context=2, context_layout="zigzag"), dict(tensor=2), 1),
        (dict(tensor=2), dict(context=2), 1),
        (dict(), dict(), 2),
    ],
    ids=["tp2 sp to one", "cp2 zigzag to tp2", "tp2 to cp2", "dp2 to one"],
)
def test_resume_at_another_layout(prefix, undisturbed, tmp_path, before, after, replicas):
    for parallel, stop in ((before, 5), (after, None)):
        values = runs.settings(prefix, tmp_path / "run", training={"exit_after_steps": stop}, parallel=parallel)
        world_size = parallel.get("tensor", 1) * parallel.get("context", 1) * (replicas if stop else 1)
        runs.run(values, resume=stop is None, world_size=world_size)
    ours, theirs = curve(tmp_path / "run"), curve(undisturbed)
    assert ours.keys() == theirs.keys()
    for step in theirs:
        # float32 sums in another order, over ten steps of Adam
        pairs = [(a, b) for a, b in zip(ours[step], theirs[step], strict=True) if b is not None]
        assert pairs and all(a == pytest.approx(b, rel=1e-5) for a, b in pairs), step


def test_bf16_resumes_bitwise_with_two_data_parallel_ranks(prefix, tmp_path):
    """fp32 masters, moments and gates survive; the distributed optimizer's shards come back to their ranks."""
    import torch

    training = {"precision": "bf16", "micro_batch_size": 1}
    for name, stops in (("whole", [None]), ("parts", [5, None])):
        for i, stop in enumerate(stops):
            values = runs.settings(prefix, tmp_path / name, training=training | {"exit_after_steps": stop})
            runs.run(values, world_size=2, resume=i > 0)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    stored = weights_and_moments(tmp_path / "parts")
    gates = [name for name in stored if name.endswith(("A_log", "dt_bias")) and name.startswith("decoder")]
    assert gates and all(stored[name].dtype == torch.float32 for name in gates)
    # Behind step 8 no validation has brought the updated weights of the other rank yet: the save has to.
    stored = weights_and_moments(tmp_path / "parts", step=8)
    masters = {
        found[1]: name for name in stored if (found := re.fullmatch(r".*\.(?:fp32_)?param\.(decoder\..+)", name))
    }
    assert len(masters) > 10
    for name, master in masters.items():
        assert torch.equal(stored[name], stored[master].to(stored[name].dtype)), name


def test_corrupt_checkpoint_is_passed_over(prefix, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    newest = tmp_path / f"run/checkpoints/step_{STEPS:08d}"
    [shard] = newest.glob("*.distcp")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    log = runs.run(runs.settings(prefix, tmp_path / "run"), resume=True)
    assert f"{shard.name} has other contents than were written" in log
    assert_same_run(tmp_path / "run", undisturbed)


def failure(values, **kwargs) -> str:
    """The log of a run that must fail."""
    with pytest.raises(AssertionError) as caught:
        runs.run(values, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model={"hidden_size": 32}), "model.hidden_size: 16 in the checkpoint, 32 now"),
        (dict(optimizer={"lr": 5e-3}), "optimizer.lr: 0.01 in the checkpoint, 0.005 now"),
        (dict(data={"documents": "separate"}), "data.documents: 'join' in the checkpoint, 'separate' now"),
        (dict(run={"seed": 7}), "run.seed: 1234 in the checkpoint, 7 now"),
    ],
)
def test_another_configuration_cannot_continue_a_run(undisturbed, prefix, change, message):
    from megatron_gdn.training.state import check_continuation

    saved = json.loads((undisturbed / f"checkpoints/step_{STEPS:08d}/info.json").read_text())["config"]
    now = json.loads(json.dumps(saved))
    for section, fields in change.items():
        now[section] |= fields
    with pytest.raises(ConfigError, match=message):
        check_continuation(parse_config(saved), parse_config(now))


@pytest.mark.parametrize(
    "change",
    [
        dict(training={"micro_batch_size": 1, "recompute": "full", "validation_samples": 2}),
        dict(model={"kernel_backend": "torch"}, checkpoint={"interval": 3}, parallel={"tensor": 2}),
    ],
)
def test_what_changes_no_number_of_a_step_may_differ(undisturbed, change):
    from megatron_gdn.training.state import check_continuation

    saved = json.loads((undisturbed / f"checkpoints/step_{STEPS:08d}/info.json").read_text())["config"]
    check_continuation(parse_config(saved), parse_config({name: saved[name] | change.get(name, {}) for name in saved}))


def test_replaced_data_cannot_continue_a_run(prefix, tmp_path):
    """Other documents under the same path."""
    copy = tmp_path / "copy"
    for suffix in ("bin", "idx"):
        shutil.copy(f"{prefix}.{suffix}", f"{copy}.{suffix}")
    values = runs.settings(copy, tmp_path / "run", training={"exit_after_steps": 2, "validation_samples": 0})
    runs.run(values)
    runs.write_dataset(tmp_path, seed=1).with_suffix(".bin").replace(f"{copy}.bin")
    (tmp_path / "text.idx").replace(f"{copy}.idx")
    assert "copy) holds other data than when step_00000002 was written" in failure(values, resume=True)


def test_used_output_folder_is_refused_without_resume(undisturbed, prefix):
    log = failure(runs.settings(prefix, undisturbed))
    assert "must be empty for a new run and holds" in log and "continue that run with --resume" in log


def test_a_start_that_failed_can_be_repeated(prefix, tmp_path):
    """It leaves the sample indices of its data, which are no run."""
    values = runs.settings(prefix, tmp_path / "run", data={"split": "100,0,0"})
    assert "the validation split of" in failure(values) and any((tmp_path / "run/cache").iterdir())
    runs.run(values | {"data": values["data"] | {"split": "80,20,0"}})


def test_wrong_data_is_refused_before_any_process_group(prefix, tmp_path):
    values = runs.settings(tmp_path / "nothing", tmp_path / "run")
    assert "nothing.bin does not exist" in failure(values)
    values = runs.settings(f"{prefix}.bin", tmp_path / "run1")
    assert "text.bin.bin does not exist: a dataset is named without .bin" in failure(values)
    values = runs.settings(prefix, tmp_path / "run2")
    values["model"] = values["model"] | {"vocab_size": 30}
    assert "model.vocab_size (30) must exceed every token id, and" in failure(values)
    values = runs.settings(prefix, tmp_path / "run4", training={"validation_samples": 3})
    assert "training.validation_samples (3) must be divisible by micro_batch_size (2) x" in failure(values)
    for suffix in ("bin", "idx"):
        shutil.copy(f"{prefix}.{suffix}", tmp_path / f"cut.{suffix}")
    os.truncate(tmp_path / "cut.bin", 100)
    log = failure(runs.settings(tmp_path / "cut", tmp_path / "run3"))
    assert "cut.bin has 100 bytes and its index says" in log and "init_process_group" not in log


WEIGHTS = (
    "must be a folder with a checkpoint, step_*/manifest.json: name the checkpoints folder of a run, or the "
    "--output of tools.convert.hf_to_megatron."
)
UNIVERSAL = (
    "must be a folder with mp_rank_00_model_states.pt and zero/: name the --output_folder of "
    "deepspeed.checkpoint.ds_to_universal."
)


@pytest.mark.parametrize(
    "setting, files, message",
    [
        ("initial_weights", None, WEIGHTS),
        ("initial_weights", "step_00000004/info.json", WEIGHTS),
        ("initial_weights", "checkpoints/step_00000004/manifest.json", WEIGHTS),
        ("initial_weights", "step_00000004/manifest.json", None),
        ("initial_universal", None, UNIVERSAL),
        ("initial_universal", "mp_rank_00_model_states.pt", UNIVERSAL),
        ("initial_universal", "zero/a/fp32.pt", UNIVERSAL),
        ("initial_universal", "mp_rank_00_model_states.pt zero/a/fp32.pt", None),
    ],
)
def test_start_from_what_is_no_checkpoint(prefix, tmp_path, setting, files, message):
    """Nothing there, a folder above the right one, one that is not converted yet."""
    from megatron_gdn.training.loop import check_initial

    start = tmp_path / "start"
    for name in (files or "").split():
        (start / name).parent.mkdir(parents=True, exist_ok=True)
        (start / name).touch()
    engine = {"name": "deepspeed" if setting == "initial_universal" else "megatron"}
    config = parse_config(runs.settings(prefix, tmp_path / "run", engine=engine, checkpoint={setting: str(start)}))
    with pytest.raises(ConfigError) if message else nullcontext() as found:
        check_initial(config)
    assert message is None or str(found.value) == f"checkpoint.{setting} ({start}) {message}"


def test_start_from_nothing_is_refused_before_any_process_group(prefix, undisturbed, tmp_path):
    """In a new run; one that goes on has weights of its own."""
    gone = {"initial_weights": str(tmp_path / "gone")}
    log = failure(runs.settings(prefix, tmp_path / "new", checkpoint=gone))
    assert f"checkpoint.initial_weights ({tmp_path / 'gone'}) must be" in log and "processes on cpu" not in log
    assert not (tmp_path / "new").exists()
    shutil.copytree(undisturbed, tmp_path / "run")
    log = runs.run(runs.settings(prefix, tmp_path / "run", checkpoint=gone), resume=True)
    assert f"continues at step {STEPS}" in log and "processes on cpu" in log


@pytest.mark.parametrize(
    "model, message",
    [
        ({"provider": "te"}, r"model.provider \(te\) needs a GPU and the run is on the CPU: use model.provider=local"),
        ({"attention_backend": "te"}, r"model.attention_backend \(te\) needs a GPU and the run is on the CPU: use"),
        ({"attention_backend": "flex"}, r"model.attention_backend \(flex\) needs a GPU and the run is on the CPU"),
    ],
)
def test_modules_that_need_a_gpu_are_refused_on_a_cpu(prefix, tmp_path, monkeypatch, model, message):
    """Before any process group; run.device=cpu hides GPUs from Megatron-Core, here and in what this process starts."""
    from megatron_gdn.training.setup import Launch, choose_device

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = parse_config(runs.settings(prefix, tmp_path / "run", model=model))
    with pytest.raises(ConfigError, match=message):
        choose_device(config, Launch(rank=0, world_size=1, local_rank=0))


def test_more_tensor_parallelism_than_processes_is_refused(prefix, tmp_path):
    log = failure(runs.settings(prefix, tmp_path / "run", parallel={"tensor": 2}))
    assert "must divide the number of processes (1)" in log
    assert not (tmp_path / "run").exists()
