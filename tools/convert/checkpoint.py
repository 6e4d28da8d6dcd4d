"""Reading a distributed checkpoint tensor by tensor, without Megatron, a GPU or a process group."""

import io
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_gdn.config import ModelConfig
from megatron_gdn.training.restricted import UnsafeCheckpointError, named_global, read_metadata
from tools.convert.errors import ConvertError

# Of keys that are no weights of the model.
_OTHER = ("optimizer.", "rng", "rerun_state_machine_state")


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """A part of a tensor: where it begins, and where its bytes are."""

    offsets: tuple[int, ...]
    path: Path
    start: int
    length: int


class MegatronCheckpoint:
    """The weights of a torch_dist checkpoint, by their keys on disk.

    Args:
        path: the folder of a checkpoint, of a run's checkpoints, or of a run; the newest step counts.

    Raises:
        ConvertError: no checkpoint there, or one without this project's `info.json`.
        UnsafeCheckpointError: a pickle that names anything but plain values.
    """

    def __init__(self, path: Path):
        self.path = _find(Path(path))
        metadata = read_metadata(self.path / ".metadata")
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith(_OTHER)
        }
        self._chunks: dict[str, list[_Chunk]] = {key: [] for key in self._tensors}
        for index, info in metadata.storage_data.items():
            if index.fqn in self._chunks:
                place = dict(path=self.path / info.relative_path, start=info.offset, length=info.length)
                self._chunks[index.fqn].append(_Chunk(offsets=tuple(index.offset or ()), **place))

    def keys(self) -> list[str]:
        """Keys of the model's weights, sorted."""
        return sorted(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Global shape of a weight."""
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """As it is stored."""
        return self._tensors[key].properties.dtype

    def read(self, key: str) -> Tensor:
        """The whole weight, put together from the parts of all ranks.

        Raises:
            ConvertError: parts that do not fill the weight, or bytes that are missing.
        """
        whole = torch.empty(self.shape(key), dtype=self.dtype(key))
        filled = 0
        for chunk in self._chunks[key]:
            part = _read_chunk(chunk, key)
            where = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, part.shape, strict=True))
            if whole[where].shape != part.shape:
                raise ConvertError(f"{chunk.path} holds a part of {key} outside its shape {list(whole.shape)}.")
            whole[where] = part
            filled += part.numel()
        if filled != whole.numel():
            raise ConvertError(f"{self.path} holds {filled} of the {whole.numel()} numbers of {key}: copy it whole.")
        return whole

    @property
    def info(self) -> dict[str, Any]:
        """What this project's training wrote beside the weights."""
        path = self.path / "info.json"
        if not path.is_file():
            raise ConvertError(f"{path} does not exist: a checkpoint of another trainer needs --config with a recipe.")
        return json.loads(path.read_text())

    @property
    def model(self) -> ModelConfig:
        """The model's section of the configuration that the checkpoint was written with."""
        try:
            return TypeAdapter(ModelConfig).validate_python(self.info["config"]["model"])
        except ValidationError as error:
            raise ConvertError(f"{self.path / 'info.json'} describes no model of this version: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary, without padding."""
        return self.info["vocabulary"]["size"]


def _find(path: Path) -> Path:
    for folder in (path, path / "checkpoints"):
        if (folder / ".metadata").is_file():
            return folder
        steps = sorted(folder.glob("step_*/manifest.json"))
        if steps:
            return steps[-1].parent
    raise ConvertError(f"{path} holds no checkpoint: name a step_... folder, or the folder of a run.")


def _read_chunk(chunk: _Chunk, key: str) -> Tensor:
    with chunk.path.open("rb") as file:
        file.seek(chunk.start)
        content = file.read(chunk.length)
    if len(content) != chunk.length:
        raise ConvertError(f"{chunk.path} ends inside {key}: copy the checkpoint whole.")
    try:
        return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpointError(f"{key} in {chunk.path} is refused: {named_global(error)}") from error
    except RuntimeError as error:
        raise ConvertError(f"{key} in {chunk.path} cannot be read ({error}): copy the checkpoint whole.") from error
