"""Writing a distributed checkpoint without Megatron, a GPU or a process group, one tensor in memory at a time."""

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from tools.convert.safetensors_io import Planned

_MAX_FILE_BYTES = 2**30


def write_checkpoint(
    folder: Path, tensors: list[Planned], objects: list[str], read: Callable[[str], Tensor], info: dict[str, Any]
) -> None:
    """Write `folder` aside, with the manifest that training checks, and rename it.

    Args:
        folder: of the checkpoint, `.../step_00000000`.
        tensors: weights by their keys on disk.
        objects: keys of the empty states that Megatron keeps beside its linear layers.
        read: gives a tensor by key; called once for each, in order.
        info: for `info.json`.
    """
    aside = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    files: dict[str, dict[str, Any]] = {}
    pending = [(tensor.name, tensor) for tensor in tensors] + [(name, None) for name in objects]
    number = 0
    while pending:
        name = f"__0_{number}.distcp"
        with _HashingFile(aside / name) as file:
            while pending and file.size < _MAX_FILE_BYTES:
                key, tensor = pending.pop(0)
                start = file.size
                if tensor is None:
                    entries[key], index = BytesStorageMetadata(), MetadataIndex(key)
                    file.write(_serialized([None]))
                else:
                    size = torch.Size(tensor.shape)
                    origin = torch.Size([0] * len(size))
                    entries[key] = TensorStorageMetadata(
                        properties=TensorProperties(dtype=tensor.dtype),
                        size=size,
                        chunks=[ChunkStorageMetadata(offsets=origin, sizes=size)],
                    )
                    index = MetadataIndex(key, origin)
                    file.write(_serialized(read(key).contiguous().clone()))
                storage[index] = _StorageInfo(relative_path=name, offset=start, length=file.size - start)
        files[name] = file.digest
        number += 1
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    backends |= {"common_backend": "torch", "common_backend_version": 1}
    metadata = Metadata(state_dict_metadata=entries, planner_data={}, storage_data=storage)
    for name, content in (
        (".metadata", pickle.dumps(metadata)),
        ("metadata.json", json.dumps(backends).encode()),
        ("common.pt", _serialized({})),
        ("info.json", json.dumps(info, indent=1).encode()),
    ):
        with _HashingFile(aside / name) as file:
            file.write(content)
        files[name] = file.digest
    manifest = {"format_version": 1, "step": info["step"], "files": files}
    with _HashingFile(aside / "manifest.json") as file:
        file.write(json.dumps(manifest, indent=1).encode())
    os.replace(aside, folder)


class _HashingFile:
    """A file that hashes what it is given and brings it to the disk when it is closed."""

    def __init__(self, path: Path):
        self._path, self._hash, self.size = path, hashlib.sha256(), 0

    def __enter__(self) -> "_HashingFile":
        self._file = self._path.open("wb")
        return self

    def __exit__(self, *error) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def write(self, content: bytes) -> None:
        """Append."""
        self._hash.update(content)
        self._file.write(content)
        self.size += len(content)

    @property
    def digest(self) -> dict[str, Any]:
        """Number of bytes and hash of what was written."""
        return {"bytes": self.size, "sha256": self._hash.hexdigest()}


def _serialized(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
