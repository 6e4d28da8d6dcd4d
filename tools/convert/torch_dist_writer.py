"""Writing a distributed checkpoint without Megatron, a GPU or a process group, one tensor in memory at a time.

Files of about a gigabyte are written one after the other into a folder aside, each with a note of what it holds, so
that a writer that was killed goes on behind the last whole file. Metadata and manifest come last, then the name.
"""

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
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

from tools.convert.errors import ConvertError
from tools.convert.safetensors_io import Planned, plan_shards

_MAX_FILE_BYTES = 2**30


@dataclass(kw_only=True)
class CheckpointWriter:
    """A checkpoint that is being written.

    folder: of the checkpoint, such as `.../step_00000000`.
    tensors: weights by our keys; `#3` is the part of expert 3 of a weight of all experts.
    objects: keys of the empty states that Megatron keeps beside its linear layers.
    common: what `common.pt` holds.
    info: for `info.json`; None: there is none, and no manifest, as Megatron-LM has neither.
    """

    folder: Path
    tensors: list[Planned]
    objects: list[str]
    common: dict[str, Any]
    info: dict[str, Any] | None
    max_file_bytes: int = _MAX_FILE_BYTES

    @property
    def aside(self) -> Path:
        """Where it is written before it is complete."""
        return self.folder.with_name(f".writing-{self.folder.name}")

    def begin(self, source: list, *, resume: bool) -> int:
        """Make the folder aside.

        Args:
            source: fingerprint of what is read, as JSON values.
            resume: keep the whole files of an earlier start.

        Returns:
            Bytes of tensors that are there already.

        Raises:
            ConvertError: the earlier start was of another conversion.
        """
        plan = json.dumps([source, [[tensor.name, tensor.shape, str(tensor.dtype)] for tensor in self.tensors]])
        note = self.aside / "plan.json"
        if not resume or not note.exists():
            shutil.rmtree(self.aside, ignore_errors=True)
            self.aside.mkdir(parents=True)
            note.write_text(plan)
        elif note.read_text() != plan:
            raise ConvertError(f"{self.aside} was begun with other settings: leave out --resume to start anew.")
        self._files = plan_shards(self.tensors, self.max_file_bytes)
        return sum(t.num_bytes for i, file in enumerate(self._files) if self._note(i).exists() for t in file)

    def _note(self, number: int) -> Path:
        return self.aside / f"whole-{number}.json"

    def write(self, read: Callable[[str], Tensor]) -> None:
        """Write what is missing, and give the folder its name.

        Args:
            read: gives a tensor by key; called once for each that is missing, in order.
        """
        files, places = {}, {}
        for number, tensors in enumerate(self._files):
            if not self._note(number).exists():
                self._write_file(number, tensors, read)
            note = json.loads(self._note(number).read_text())
            files[f"__0_{number}.distcp"] = note["digest"]
            places |= {key: (number, start, length) for key, start, length in note["places"]}
        number = len(self._files)
        with _HashingFile(self.aside / f"__0_{number}.distcp") as file:
            for key in self.objects:
                start = file.size
                torch.save([None], file)
                places[key] = (number, start, file.size - start)
        files[f"__0_{number}.distcp"] = file.digest
        backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        backends |= {"common_backend": "torch", "common_backend_version": 1}
        small = {
            ".metadata": pickle.dumps(self._metadata(places)),
            "metadata.json": json.dumps(backends).encode(),
            "common.pt": _serialized(self.common),
        }
        if self.info is not None:
            small["info.json"] = json.dumps(self.info, indent=1).encode()
        for name, content in small.items():
            with _HashingFile(self.aside / name) as file:
                file.write(content)
            files[name] = file.digest
        if self.info is not None:
            manifest = {"format_version": 1, "step": self.info["step"], "files": files}
            with _HashingFile(self.aside / "manifest.json") as file:
                file.write(json.dumps(manifest, indent=1).encode())
        for note in (*self.aside.glob("whole-*.json"), self.aside / "plan.json"):
            note.unlink()
        if self.folder.exists():
            shutil.rmtree(self.folder)
        os.replace(self.aside, self.folder)

    def _write_file(self, number: int, tensors: list[Planned], read: Callable[[str], Tensor]) -> None:
        path, places = self.aside / f"__0_{number}.distcp", []
        try:
            with _HashingFile(path) as file:
                for tensor in tensors:
                    start, data = file.size, read(tensor.name).to(tensor.dtype)
                    assert tuple(data.shape) == tensor.shape, tensor.name
                    if "#" in tensor.name:
                        data = data.unsqueeze(0)
                    # torch.save writes the whole storage of a view.
                    whole = data.untyped_storage().nbytes() == data.nbytes and data.is_contiguous()
                    torch.save(data if whole else data.clone(memory_format=torch.contiguous_format), file)
                    places.append((tensor.name, start, file.size - start))
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        aside = self._note(number).with_suffix(".partial")
        aside.write_text(json.dumps({"digest": file.digest, "places": places}))
        os.replace(aside, self._note(number))

    def _metadata(self, places: dict[str, tuple[int, int, int]]) -> Metadata:
        entries: dict[str, Any] = {key: BytesStorageMetadata() for key in self.objects}
        chunks: dict[str, list[ChunkStorageMetadata]] = {}
        storage = {}

        def place(key: str) -> _StorageInfo:
            number, start, length = places[key]
            return _StorageInfo(relative_path=f"__0_{number}.distcp", offset=start, length=length)

        for key in self.objects:
            storage[MetadataIndex(key)] = place(key)
        for tensor in self.tensors:
            name, _, expert = tensor.name.partition("#")
            shape = (1, *tensor.shape) if expert else tensor.shape
            offsets = torch.Size([int(expert or 0)] + [0] * (len(shape) - 1))
            chunks.setdefault(name, []).append(ChunkStorageMetadata(offsets=offsets, sizes=torch.Size(shape)))
            storage[MetadataIndex(name, offsets)] = place(tensor.name)
            number = len(chunks[name]) if expert else shape[0]
            entries[name] = TensorStorageMetadata(
                properties=TensorProperties(dtype=tensor.dtype),
                size=torch.Size([number, *shape[1:]]),
                chunks=chunks[name],
            )
        return Metadata(state_dict_metadata=entries, planner_data={}, storage_data=storage)


class _HashingFile(io.RawIOBase):
    """A file that hashes what it is given and brings it to the disk when it is closed."""

    def __init__(self, path: Path):
        self._file, self._hash, self.size = path.open("wb"), hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, content) -> int:
        """Append."""
        view = memoryview(content).cast("B")
        self._hash.update(view)
        self._file.write(view)
        self.size += len(view)
        return len(view)

    def tell(self) -> int:
        return self.size

    def close(self) -> None:
        """Bring it to the disk."""
        if not self._file.closed:
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
        super().close()

    @property
    def digest(self) -> dict[str, Any]:
        """Number of bytes and hash of what was written."""
        return {"bytes": self.size, "sha256": self._hash.hexdigest()}


def _serialized(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
