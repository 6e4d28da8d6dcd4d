"""Reading the pickles of a distributed checkpoint without executing anything, and without Megatron."""

import pickle
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata


class UnsafeCheckpointError(RuntimeError):
    """A checkpoint that wants to run code or to reach outside its folder."""


@dataclass
class _MegatronMetadata(Metadata):
    """Stands for the class of older Megatron-Cores; what it adds is not read."""


class _Unread:
    """Stands for a class whose contents are not read."""


_DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
    *("float8_e4m3fn", "float8_e5m2"),
)
# What `.metadata` is made of; nothing in the list does more than hold values.
_ALLOWED = {
    "torch": {"Size", "device", "strided", *_DTYPES},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata"),
        *("ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
}
_STAND_INS = {
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): _MegatronMetadata,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): _Unread,
}


def _enum_member(cls: type, name: str) -> Any:
    """What Python 3.11.0 to 3.11.3 write `getattr` for: a member of an enumeration, and nothing else."""
    if isinstance(cls, type) and issubclass(cls, Enum) and name in cls.__members__:
        return cls[name]
    raise UnsafeCheckpointError(f"a checkpoint names getattr({cls!r}, {name!r}), which none needs: do not load it.")


class _RestrictedUnpickler(pickle.Unpickler):
    def __init__(self, file, path: Path):
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _STAND_INS:
            return _STAND_INS[module, name]
        if module in ("builtins", "__builtin__") and name == "getattr":
            return _enum_member
        if name not in _ALLOWED.get(module, ()):
            raise UnsafeCheckpointError(
                f"{self._path} names {module}.{name}, which no checkpoint needs: do not load it."
            )
        return super().find_class(module, name)


def read_metadata(path: Path) -> Metadata:
    """The `.metadata` of a distributed checkpoint.

    Args:
        path: the file.

    Raises:
        UnsafeCheckpointError: it names anything but plain values, or a file outside its folder.
    """
    with path.open("rb") as file:
        metadata = _RestrictedUnpickler(file, path).load()
    for info in metadata.storage_data.values():
        if Path(info.relative_path).name != str(info.relative_path):
            raise UnsafeCheckpointError(f"{path} names the file {info.relative_path}, which is outside the folder.")
    return metadata


def named_global(error: pickle.UnpicklingError) -> str:
    """Torch's reason for refusing a pickle, without its advice to lift the restriction."""
    lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "global" in line]
    return lines[0] if lines else "it is no plain pickle of tensors and values"
