"""Sharded safetensors: read lazily through the library, written tensor by tensor so that none but one is in memory."""

import json
import os
import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tools.convert.errors import ConvertError

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_NAMES = {name: dtype for dtype, name in _DTYPES.items()}
_BLOCK_BYTES = 2**24
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as "5GB" or "500MiB".

    Raises:
        ConvertError: anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)", text.strip().upper())
    if match is None or float(match[1]) == 0:
        raise ConvertError(f"--max-shard-size ({text}) must be a size such as 5GB or 500MiB.")
    return int(float(match[1]) * _UNITS[match[2]])


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')} {list(self.shape)}"

    @property
    def num_bytes(self) -> int:
        """Of its contents."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def plan_shards(tensors: list[Planned], max_bytes: int) -> list[list[Planned]]:
    """Tensors in order, in files of at most `max_bytes`; a larger tensor gets a file of its own."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def shard_names(count: int) -> list[str]:
    """Names of the files, as transformers expects them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def write_shard(path: Path, tensors: list[Planned], read: Callable[[str], Tensor]) -> None:
    """Write one file aside and rename it when it is complete and on the disk.

    Args:
        path: of the file.
        tensors: its tensors, in order.
        read: gives a tensor of the planned shape by name; called once for each, in order.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.num_bytes],
        }
        offset += tensor.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    aside = path.with_name(path.name + ".partial")
    with _removed_on_error(aside), aside.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            data = read(tensor.name)
            assert tuple(data.shape) == tensor.shape, tensor.name
            # A few rows at a time, so that another dtype or order takes no second copy of a large tensor.
            rows = max(1, _BLOCK_BYTES // max(1, tensor.num_bytes // max(1, len(data))))
            for start in range(0, len(data), rows):
                block = data[start : start + rows].to(tensor.dtype).contiguous()
                file.write(block.view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


@contextmanager
def _removed_on_error(path: Path):
    """A file that could not be written whole goes away and gives its space back."""
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def write_index(folder: Path, shards: list[list[Planned]], names: list[str]) -> None:
    """Write `model.safetensors.index.json` where there are several files."""
    if len(shards) == 1:
        return
    total = sum(tensor.num_bytes for shard in shards for tensor in shard)
    files = {tensor.name: name for shard, name in zip(shards, names, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


class SafetensorsFolder:
    """The tensors of a Hugging Face folder, read one at a time.

    Raises:
        ConvertError: no safetensors there, an index that names what is not there, a file that is cut.
    """

    def __init__(self, folder: Path):
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                files = json.loads(index.read_text())["weight_map"]
                names = sorted(set(files.values()))
                if not all(isinstance(name, str) for name in names):
                    raise TypeError("weight_map must hold names of files")
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise ConvertError(f"{index} is not an index of safetensors ({error!r}).") from error
        elif (folder / "model.safetensors").is_file():
            files, names = None, ["model.safetensors"]
        else:
            raise ConvertError(f"{folder} has no model.safetensors and no index: pickled weights are not read.")
        self._stored: dict[str, _Stored] = {}
        self._opened: tuple[Path, Any] | None = None
        self._mapped_bytes = 0
        for name in names:
            path = folder / name
            if Path(name).name != name or not path.is_file():
                raise ConvertError(f"{path} does not exist, and {index} names it: copy the folder whole.")
            with _open(path) as file:
                for key in file.keys():
                    if files is not None and files.get(key) != name:
                        raise ConvertError(f"{path} holds {key}, and {index} says otherwise: copy the folder whole.")
                    found = file.get_slice(key)
                    self._stored[key] = _Stored(path, tuple(found.get_shape()), found.get_dtype())
        if missing := sorted(set(files or ()) - set(self._stored)):
            raise ConvertError(f"{index} names {missing[0]}, which no file holds: copy the folder whole.")

    @property
    def fingerprint(self) -> list:
        """Tells this folder from another: names, sizes and times of its files."""
        files = sorted({stored.path for stored in self._stored.values()})
        return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]

    def keys(self) -> list[str]:
        """Names of the tensors, sorted."""
        return sorted(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor, without reading it."""
        found = self._stored[name].dtype
        if found not in _NAMES:
            raise ConvertError(f"{name} has the dtype {found}: only {', '.join(_NAMES)} are converted.")
        return _NAMES[found]

    def read(self, name: str) -> Tensor:
        """A tensor, as it is stored."""
        path = self._stored[name].path
        if self._opened is None or self._opened[0] != path or self._mapped_bytes > _BLOCK_BYTES:
            # Only one file is mapped at a time, and its pages stay in memory for as long as it is.
            self._opened, self._mapped_bytes = (path, _open(path)), 0
        found = self._opened[1].get_tensor(name)
        self._mapped_bytes += found.nbytes
        return found


@dataclass(frozen=True)
class _Stored:
    path: Path
    shape: tuple[int, ...]
    dtype: str


def _open(path: Path):
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConvertError(f"{path} cannot be read as safetensors ({error}): copy it whole.") from error
