"""Megatron's torch_dist format: written with a hash of every byte, read without executing anything.

The files are those of `megatron.core.dist_checkpointing` (`.metadata`, `*.distcp`, `common.pt`, `metadata.json`), and
Megatron's own loader reads them. Its writer is not used: it forks a process that hangs when the entry script has no
`__main__` guard, and hashes nothing. Its reader is not used either: it unpickles `.metadata` and objects without
restriction (torch 2.13, megatron-core 0.16.1).
"""

import hashlib
import io
import json
import os
import pickle
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing import load as megatron_load
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter

from megatron_gdn.training.restricted import UnsafeCheckpointError, named_global, read_metadata

Digests = dict[str, dict[str, Any]]
COMMON_STATE = "common_state/shard_0_1"
"""The object in which Megatron-Core 0.19 stores what earlier releases, and `write`, put into `common.pt`."""


class _HashingStream(io.RawIOBase):
    """A file that hashes what it is given before it writes it; sequential."""

    def __init__(self, path: Path):
        self._file = open(path, "wb")  # noqa: SIM115 - closed in close()
        self._hash = hashlib.sha256()
        self._size = 0

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self._file.write(view)
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        """Bring the bytes to the disk and close; the writer that it is lent to may close it first."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        super().close()

    @property
    def digest(self) -> dict[str, Any]:
        """Number of bytes and hash of what was written."""
        return {"bytes": self._size, "sha256": self._hash.hexdigest()}


class _HashingFileSystem(FileSystem):
    """Keeps the digest of every file written through it, under the name that it has in the end."""

    def __init__(self):
        self.digests: Digests = {}

    @contextmanager
    def create_stream(self, path, mode: str):
        assert mode == "wb", mode
        with _HashingStream(Path(path)) as stream:
            yield stream
        self.digests[Path(path).name] = stream.digest

    def rename(self, path, new_path) -> None:
        super().rename(path, new_path)
        self.digests[Path(new_path).name] = self.digests.pop(Path(path).name)


class _Writer(FileSystemWriter):
    def __init__(self, path: Path):
        super().__init__(path, single_file_per_rank=True, sync_files=False, thread_count=1, overwrite=False)
        self.fs = _HashingFileSystem()


@contextmanager
def _first_failure():
    """Raise the error of the lowest rank that failed; torch's collection of all of them is no Exception."""
    try:
        yield
    except dcp.api.CheckpointException as error:
        raise error.failures[min(error.failures)][0] from error


def write(sharded_state: dict[str, Any], directory: Path) -> Digests:
    """Write a sharded state dict; collective over all ranks.

    Args:
        sharded_state: Megatron's sharded state dict; consumed.
        directory: exists and is empty.

    Returns:
        Size and SHA-256 of every file that this rank wrote, by name, computed from the bytes in memory.
    """
    sharded, common = save_preprocess(sharded_state)
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    writer = _Writer(directory)
    with _first_failure():
        dcp.save(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=writer,
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
    digests = writer.fs.digests
    if torch.distributed.get_rank() == 0:
        backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        backends |= {"common_backend": "torch", "common_backend_version": 1}
        serialized = io.BytesIO()
        torch.save(common, serialized)
        digests["common.pt"] = write_bytes(directory / "common.pt", serialized.getvalue())
        digests["metadata.json"] = write_bytes(directory / "metadata.json", json.dumps(backends).encode())
    return digests


def write_bytes(path: Path, data: bytes) -> dict[str, Any]:
    """Write a file and bring it to the disk; its size and hash."""
    with _HashingStream(path) as stream:
        stream.write(data)
    return stream.digest


class _Reader(FileSystemReader):
    """Reads `.metadata` through the allow-list, and only files inside the folder."""

    def __init__(self, path: Path):
        super().__init__(path)
        # Here, because torch would take an error in its own call for a file that is not there.
        self._metadata = self._read()

    def read_metadata(self, *args, **kwargs):
        return self._metadata

    def _read(self):
        path = Path(self._get_metadata_path())
        metadata = read_metadata(path)
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(MCoreLoadPlanner):
    """Reads objects with torch's restricted unpickler."""

    def load_bytes(self, read_item, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            self.state_dict[name] = torch.load(value, weights_only=True, map_location="cpu")
        except pickle.UnpicklingError as error:
            raise UnsafeCheckpointError(f"object {name} of the checkpoint is refused: {named_global(error)}") from error


@contextmanager
def _restricted():
    """Megatron leaves the restriction of torch.load to its default, which an environment variable lifts: not here."""
    name = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


class _LoadStrategy(TorchDistLoadShardedStrategy):
    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path, *_) -> dict[str, Any]:
        by_key, flat_mapping, rename_mapping = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        tensors = [t for t in nested_values(sharded_state_dict) if isinstance(t, ShardedTensor)]
        state = mcore_to_pyt_state_dict(by_key, True)
        planner = _Planner(
            shapes_validation_sharded_tensors=[t for t in tensors if not t.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={t.key: t for t in tensors if t.allow_shape_mismatch},
            flatten_state_dict=False,
            flatten_sharded_tensors=False,
        )
        with _first_failure():
            dcp.load(state, storage_reader=_Reader(checkpoint_dir), planner=planner)
        state = {key: _unwrap_pyt_sharded_tensor(value) for key, value in state.items()}
        state = _replace_sharded_keys_with_state_dict_keys(state, flat_mapping, rename_mapping)
        _restore_dict_types(state, sharded_state_dict)
        return state


def read(sharded_state: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Load into the layout that `sharded_state` describes; collective over all ranks.

    Args:
        sharded_state: Megatron's sharded state dict as a template.
        directory: written by `write` or by Megatron's `dist_checkpointing.save`.

    Raises:
        UnsafeCheckpointError: a pickle that names anything but plain values, or a path out of the folder.
    """
    # Read here for an error that says which file it is; Megatron reads it again.
    path = directory / "common.pt"
    if path.is_file():
        try:
            torch.load(path, weights_only=True, map_location="cpu")
        except pickle.UnpicklingError as error:
            raise UnsafeCheckpointError(f"{path} is refused: {named_global(error)}") from error
    else:
        planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
        dcp.load({COMMON_STATE: io.BytesIO()}, storage_reader=_Reader(directory), planner=planner, no_dist=True)
    with _restricted():
        return megatron_load(sharded_state, str(directory), sharded_strategy=_LoadStrategy())
