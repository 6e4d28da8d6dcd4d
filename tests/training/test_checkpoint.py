"""Checkpoints: read by Megatron's own loader and back, resharded, verified, atomic, and never executing anything."""

import json
import os
import pickle
import random
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_gdn.training import checkpoint, torch_dist
from megatron_gdn.training.checkpoint import CheckpointError, CheckpointStore, verify
from tests.ranks import RankError, pool


def numbers(shape, dtype, seed) -> torch.Tensor:
    values = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 200 - 100
    return values.to(dtype)


WHOLE = {
    "weight": numbers((8, 6), torch.float32, 1),
    "half": numbers((4, 3), torch.bfloat16, 2),
    "ids": numbers((16,), torch.int64, 3),
    "shared": numbers((5,), torch.float32, 4),
}
COMMON = {"step": 7, "lr": 1e-3, "nested": {"betas": [0.9, 0.95]}}


def sharded_state(filled: bool, seed: int = 0):
    """WHOLE over the ranks of the world: three sharded tensors, a replicated one, one object per rank, plain values."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    rank, size = dist.get_rank(), dist.get_world_size()
    state = {}
    for name, whole in WHOLE.items():
        value = (whole + seed).to(whole.dtype) if filled else torch.zeros_like(whole)
        if name == "shared":
            state[name] = ShardedTensor.from_rank_offsets(name, value, replica_id=rank)
        else:
            local = value.chunk(size)[rank].clone()
            state[name] = ShardedTensor.from_rank_offsets(name, local, (0, rank, size), replica_id=0)
    state["rng"] = ShardedObject("rng", {"state": torch.arange(3) + rank}, (size,), (rank,), replica_id=0)
    return state | (json.loads(json.dumps(COMMON)) if filled else {})


def check_local(loaded, seed: int = 0, objects: bool = True):
    rank, size = dist.get_rank(), dist.get_world_size()
    for name, whole in WHOLE.items():
        expected = (whole + seed).to(whole.dtype)
        expected = expected if name == "shared" else expected.chunk(size)[rank]
        assert torch.equal(loaded[name], expected), name
    if objects:
        rng = loaded["rng"][0] if isinstance(loaded["rng"], list) else loaded["rng"]
        assert torch.equal(rng["state"], torch.arange(3) + rank)
    assert {name: loaded[name] for name in COMMON} == COMMON


def save(root, step=1, seed=0, keep=None):
    CheckpointStore(root, keep=keep).save(step, sharded_state(True, seed), info={"seed": seed})


def load_latest(root, seed=0, objects=True):
    store = CheckpointStore(root)
    path = store.latest()
    state = sharded_state(False)
    if not objects:
        state.pop("rng")  # one object per rank: of another number of ranks there is none for each
    check_local(store.load(path, state), seed, objects)
    return path.name, store.info(path)


def load_with_megatron(path):
    from megatron.core import dist_checkpointing

    check_local(dist_checkpointing.load(sharded_state(False), str(path)))


def save_with_megatron(path):
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    if dist.get_rank() == 0:
        path.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(sharded_state(True), str(path), TorchDistSaveShardedStrategy("torch_dist", 1))


def load_with_our_reader(path):
    check_local(torch_dist.read(sharded_state(False), path))


def test_round_trip_and_other_numbers_of_ranks(tmp_path):
    pool(2).run(save, tmp_path)
    assert pool(2).run(load_latest, tmp_path) == [("step_00000001", {"seed": 0})] * 2
    for size in (1, 4):
        pool(size).run(load_latest, tmp_path, objects=False)


def test_megatrons_loader_reads_ours(tmp_path):
    pool(2).run(save, tmp_path)
    pool(2).run(load_with_megatron, tmp_path / "step_00000001")


def test_we_read_megatrons(tmp_path):
    pool(2).run(save_with_megatron, tmp_path / "theirs", timeout_s=60)
    pool(2).run(load_with_our_reader, tmp_path / "theirs")


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """Steps 1 and 2 with different numbers."""
    root = tmp_path_factory.mktemp("checkpoints")
    for step in (1, 2):
        pool(2).run(save, root, step=step, seed=step)
    return root


def flip_bit(path: Path, rng: random.Random):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def test_any_flipped_bit_is_found_and_the_older_checkpoint_used(two_checkpoints, tmp_path, caplog):
    rng = random.Random(0)
    names = sorted(path.name for path in (two_checkpoints / "step_00000002").iterdir())
    assert {".metadata", "common.pt", "metadata.json", "info.json", "manifest.json"} < set(names)
    for i in range(24):
        root = tmp_path / str(i)
        shutil.copytree(two_checkpoints, root)
        name = names[i % len(names)]
        flip_bit(root / "step_00000002" / name, rng)
        caplog.clear()
        assert CheckpointStore(root).latest() == root / "step_00000001", name
        assert name in caplog.text or name == "manifest.json"
    pool(2).run(load_latest, tmp_path / "0", seed=1)


def swap_shards(path):
    first, second = sorted(path.glob("*.distcp"))[:2]
    first.rename(path / "x")
    second.rename(first)
    (path / "x").rename(second)


DAMAGES = {
    "empty": lambda path: os.truncate(next(path.glob("*.distcp")), 0),
    "one byte short": lambda path: os.truncate(path / "common.pt", (path / "common.pt").stat().st_size - 1),
    "missing": lambda path: next(path.glob("*.distcp")).unlink(),
    "too many": lambda path: (path / "more.distcp").write_bytes(b"x"),
    "swapped": swap_shards,
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "stale": lambda path: shutil.copy(next(path.parent.glob("step_00000001/*.distcp")), next(path.glob("*.distcp"))),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_passed_over(two_checkpoints, tmp_path, damage):
    shutil.copytree(two_checkpoints, tmp_path / "root")
    assert CheckpointStore(tmp_path / "root").latest().name == "step_00000002"
    DAMAGES[damage](tmp_path / "root/step_00000002")
    assert CheckpointStore(tmp_path / "root").latest().name == "step_00000001"


def test_no_valid_checkpoint_is_an_error_and_none_at_all_is_not(two_checkpoints, tmp_path):
    assert CheckpointStore(tmp_path / "nothing").latest() is None
    shutil.copytree(two_checkpoints, tmp_path / "root")
    for path in (tmp_path / "root").iterdir():
        (path / "common.pt").unlink()
    with pytest.raises(CheckpointError, match="has 2 checkpoints and none of them is whole"):
        CheckpointStore(tmp_path / "root").latest()


def test_a_whole_checkpoint_of_the_same_step_stays_and_a_damaged_one_is_replaced(tmp_path):
    for seed in (1, 2):
        pool(1).run(save, tmp_path, seed=seed)
        pool(1).run(load_latest, tmp_path, seed=1)
    os.truncate(tmp_path / "step_00000001/common.pt", 10)
    pool(1).run(save, tmp_path, seed=2)
    pool(1).run(load_latest, tmp_path, seed=2)


def save_three_and_list(root):
    for step in (1, 2, 3):
        save(root, step=step, keep=2)
    return CheckpointStore(root).steps()


def test_keep_prunes_the_oldest(tmp_path):
    assert pool(2).run(save_three_and_list, tmp_path) == [[2, 3]] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]


class Killed(BaseException):
    """Ends a save at a failpoint without any of its clearing up, as SIGKILL does (test_pretrain sends real ones)."""


def save_and_die(root, failpoint):
    def die(name):
        if name == failpoint:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "failpoint", die)
        with pytest.raises(Killed):
            save(root, step=3, seed=3, keep=2)


FAILPOINTS = {"prepared": 2, "shards": 2, "manifest": 2, "rename": 2, "renamed": 3, "prune": 3}


@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_kill_inside_a_save_keeps_the_last_complete_checkpoint(tmp_path, failpoint):
    for step in (1, 2):
        pool(1).run(save, tmp_path, step=step, seed=step)
    pool(1).run(save_and_die, tmp_path, failpoint)
    [(name, _)] = pool(1).run(load_latest, tmp_path, seed=FAILPOINTS[failpoint])
    assert name == f"step_{FAILPOINTS[failpoint]:08d}"
    # The next save clears up what the dead one left.
    pool(1).run(save, tmp_path, step=4, seed=4)
    assert not list(tmp_path.glob(".writing-*"))


class Payload:
    """Creates the canary file when a pickle of it is executed."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def poison_metadata(path, canary):
    (path / ".metadata").write_bytes(pickle.dumps(Payload(canary)))


def poison_common(path, canary):
    torch.save({"step": Payload(canary)}, path / "common.pt")


class Attribute:
    """What Python 3.11.0 to 3.11.3 write for a member of an enumeration; of anything else it could reach code."""

    def __init__(self, holder, name):
        self.holder, self.name = holder, name

    def __reduce__(self):
        return getattr, (self.holder, self.name)


def test_members_of_enumerations_are_read_and_no_other_attribute(tmp_path):
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

    from megatron_gdn.training.restricted import UnsafeCheckpointError, read_metadata

    for holder, name in ((_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT"), (Metadata, "__init__"), (torch.Size, "mro")):
        metadata = Metadata(state_dict_metadata={}, planner_data=Attribute(holder, name), storage_data={})
        (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
        if holder is _MEM_FORMAT_ENCODING:
            assert read_metadata(tmp_path / ".metadata").planner_data is _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT
        else:
            with pytest.raises(UnsafeCheckpointError, match=f"names getattr.*'{name}'"):
                read_metadata(tmp_path / ".metadata")


def write_poisoned_object(root, canary):
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    state = sharded_state(True)
    state["rng"] = ShardedObject("rng", Payload(canary), (1,), (0,), replica_id=0)
    CheckpointStore(root).save(1, state, info={})


def write_poisoned_common_object(root, canary):
    """As Megatron-Core 0.19 writes what is common to all ranks."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    path = root / "step_00000001"
    path.mkdir(parents=True)
    common = ShardedObject("common_state", {"step": Payload(canary)}, (1,), (0,), replica_id=0)
    torch_dist.write(sharded_state(True) | {"common": common}, path)
    (path / "common.pt").unlink()


def load_where_torch_is_told_to_run_code(path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        load_with_our_reader(path)


@pytest.mark.parametrize("load", [load_with_our_reader, load_where_torch_is_told_to_run_code])
@pytest.mark.parametrize(
    "poison", [poison_metadata, poison_common, write_poisoned_object, write_poisoned_common_object]
)
def test_malicious_pickle_is_refused(tmp_path, poison, load):
    """The manifest is no defence here: who can write the pickle can write the manifest."""
    canary = tmp_path / "canary"
    if poison.__name__.startswith("write_"):
        pool(1).run(poison, tmp_path / "root", canary)
        assert not canary.exists()
    else:
        pool(1).run(save, tmp_path / "root")
        poison(tmp_path / "root/step_00000001", canary)
    with pytest.raises(RankError, match="UnsafeCheckpointError: .*posix.system"):
        pool(1).run(load, tmp_path / "root/step_00000001")
    assert not canary.exists()


def load_what_is_replaced_on_the_way(path, canary):
    """common.pt becomes another one between its check and Megatron's reading of it."""
    load = torch_dist.megatron_load

    def later(state, directory, **kwargs):
        poison_common(path, canary)
        return load(state, directory, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        patch.setattr(torch_dist, "megatron_load", later)
        try:
            load_with_our_reader(path)
        finally:
            assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"


def test_a_file_that_is_replaced_after_its_check_runs_nothing(tmp_path):
    pool(1).run(save, tmp_path / "root")
    with pytest.raises(RankError, match="UnpicklingError: .*(?s:.*)posix.system"):
        pool(1).run(load_what_is_replaced_on_the_way, tmp_path / "root/step_00000001", tmp_path / "canary")
    assert not (tmp_path / "canary").exists()


def test_path_out_of_the_folder_is_refused(tmp_path):
    pool(1).run(save, tmp_path / "root")
    path = tmp_path / "root/step_00000001/.metadata"
    metadata = pickle.loads(path.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../step_00000001/" + info.relative_path
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(RankError, match="UnsafeCheckpointError.*which is outside the folder"):
        pool(1).run(load_with_our_reader, path.parent)


def save_with_a_full_disk(root):
    """Files may grow to 1 KiB, as if the disk were full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        if dist.get_rank() == 1:  # on one rank only: the other must not wait for it
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
        save(root, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_is_an_error_on_all_ranks_and_keeps_the_previous(tmp_path):
    pool(2).run(save, tmp_path)
    with pytest.raises(RankError) as caught:
        pool(2).run(save_with_a_full_disk, tmp_path)
    assert str(caught.value).count("CheckpointError: cannot write") == 2
    assert pool(2).run(load_latest, tmp_path)[0][0] == "step_00000001"
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_file_in_the_way(tmp_path):
    (tmp_path / "root").write_text("not a folder")
    with pytest.raises(RankError, match="CheckpointError: cannot prepare"):
        pool(1).run(save, tmp_path / "root")


def test_verify_names_the_file(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints / "step_00000002", tmp_path / "step_00000003")
    assert verify(two_checkpoints / "step_00000002") is None
    assert "is that of step 2" in verify(tmp_path / "step_00000003")
    manifest = tmp_path / "step_00000003/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format_version": 2}))
    assert verify(tmp_path / "step_00000003") == "manifest.json has format_version 2 and this version reads 1"
