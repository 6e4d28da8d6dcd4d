"""Reading a distributed checkpoint of Megatron-Core tensor by tensor, without Megatron, a GPU or a process group.

    .metadata  *.distcp  common.pt  metadata.json      Megatron's torch_dist, of any parallel layout
    info.json                                          this project's: the configuration of the run
    ../latest_checkpointed_iteration.txt               Megatron-LM's: its arguments are in common.pt, of
                                                       Megatron-Core 0.19 in an object of the *.distcp

Keys are this project's; Megatron-LM's names of the norms that Transformer Engine fuses into linear layers are read as
those of the norms by themselves.
"""

import io
import json
import pickle
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_gdn.config import ModelConfig
from megatron_gdn.config.load import explain
from megatron_gdn.training.restricted import UnsafeCheckpointError, named_global, read_metadata
from tools.convert.architecture import Architecture, Experts
from tools.convert.errors import ConvertError
from tools.convert.megatron_lm import architecture_of_args, our_key, read_args, vocabulary_of_args

# Of keys that are no weights of the model.
_OTHER = ("optimizer.", "chained_", "rng", "rerun_state_machine_state")
# Weights in float32 that a run in bfloat16 keeps, in either of the layouts that can be read at other parallel sizes.
_MASTER = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(?:fp32_)?param\.(.+)")
# Megatron-Core 0.19 stores an object of this name in the place of common.pt.
_COMMON_STATE = "common_state/shard_0_1"
_EXPERTS = re.compile(r"\.mlp\.experts\.experts\.linear_fc[12]\.weight$")


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """A part of a tensor: where it begins, its shape, and where its bytes are."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    start: int
    length: int


class MegatronCheckpoint:
    """The weights of a torch_dist checkpoint, by our keys.

    Args:
        path: the folder of a checkpoint, of a run's checkpoints, or of a run; the newest step counts.
        master: read the optimizer's weights in float32 instead of those that the model computes with.

    Raises:
        ConvertError: no checkpoint there; `master` and the checkpoint has no such weights.
        UnsafeCheckpointError: a pickle that names anything but plain values.
    """

    def __init__(self, path: Path, *, master: bool = False):
        self.path = find_checkpoint(Path(path))
        metadata = _read_metadata(self.path / ".metadata")
        everything = metadata.state_dict_metadata.items()
        entries = {key: entry for key, entry in everything if isinstance(entry, TensorStorageMetadata)}
        names = {key: our_key(key) for key in entries if not key.startswith(_OTHER)}
        if master:
            masters = {key: our_key(match[1]) for key in entries if (match := _MASTER.fullmatch(key))}
            if missing := sorted(set(names.values()) - set(masters.values())):
                raise ConvertError(
                    f"{self.path} has no float32 weights of {missing[0]} in its optimizer: --weights master needs a "
                    "run in bf16 whose optimizer is stored for any layout."
                )
            names = masters
        self._common: _Chunk | None = None
        self._tensors: dict[str, TensorStorageMetadata] = {name: entries[key] for key, name in names.items()}
        self._chunks: dict[str, list[_Chunk]] = {name: [] for name in names.values()}
        sizes = {(key, tuple(chunk.offsets)): tuple(chunk.sizes) for key in names for chunk in entries[key].chunks}
        for index, info in metadata.storage_data.items():
            if index.fqn in names:
                offsets = tuple(index.offset or ())
                place = dict(path=self.path / info.relative_path, start=info.offset, length=info.length)
                shape = sizes.get((index.fqn, offsets), ())
                self._chunks[names[index.fqn]].append(_Chunk(offsets=offsets, sizes=shape, **place))
            elif index.fqn == _COMMON_STATE:
                place = dict(path=self.path / info.relative_path, start=info.offset, length=info.length)
                self._common = _Chunk(offsets=(), sizes=(), **place)

    @cached_property
    def _keys(self) -> list[str]:
        keys = []
        for key, entry in self._tensors.items():
            experts = range(entry.size[0]) if _EXPERTS.search(key) else None
            keys += [key] if experts is None else [f"{key}#{e}" for e in experts]
        return sorted(keys)

    def keys(self) -> list[str]:
        """Keys of the model's weights, sorted; one for each expert."""
        return list(self._keys)

    def shape(self, key: str) -> tuple[int, ...]:
        """Global shape of a weight."""
        name, expert = _split(key)
        shape = tuple(self._tensors[name].size)
        return shape if expert is None else shape[1:]

    def dtype(self, key: str) -> torch.dtype:
        """As it is stored."""
        return self._tensors[_split(key)[0]].properties.dtype

    def read(self, key: str) -> Tensor:
        """The whole weight, put together from the parts of all ranks.

        Raises:
            ConvertError: parts that do not fill the weight, or bytes that are missing.
        """
        name, expert = _split(key)
        shape = tuple(self._tensors[name].size)
        chunks = self._chunks[name]
        first, count = (0, shape[0] if shape else 0) if expert is None else (expert, 1)
        if expert is None and len(chunks) == 1 and chunks[0].sizes == shape:
            return self._checked(_read_chunk(chunks[0], name), shape, chunks[0].path, name)
        whole, filled = torch.empty((count, *shape[1:]), dtype=self.dtype(name)), 0
        for chunk in chunks:
            if len(chunk.offsets) != len(shape) or len(chunk.sizes) != len(shape):
                raise ConvertError(f"{chunk.path} holds a part of {key} without a place in it: copy it whole.")
            # Experts are the first dimension; of a part that holds others, only this one's rows count.
            start, stop = max(chunk.offsets[0], first), min(chunk.offsets[0] + chunk.sizes[0], first + count)
            if start >= stop:
                continue
            part = self._checked(_read_chunk(chunk, name), chunk.sizes, chunk.path, name)
            part = part[start - chunk.offsets[0] : stop - chunk.offsets[0]]
            where = (slice(start - first, stop - first),) + tuple(
                slice(offset, offset + size) for offset, size in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)
            )
            if whole[where].shape != part.shape:
                raise ConvertError(f"{chunk.path} holds a part of {key} outside its shape {list(shape)}.")
            whole[where] = part
            filled += part.numel()
        if filled != whole.numel():
            raise ConvertError(f"{self.path} holds {filled} of the {whole.numel()} numbers of {key}: copy it whole.")
        return whole if expert is None else whole[0]

    def _checked(self, part: Tensor, shape: tuple[int, ...], path: Path, name: str) -> Tensor:
        if not isinstance(part, Tensor) or tuple(part.shape) != shape or part.dtype != self.dtype(name):
            raise ConvertError(f"{path} holds something else than .metadata says of {name}: copy the checkpoint whole.")
        return part

    @property
    def fingerprint(self) -> list:
        """Tells this checkpoint from another: names, sizes and times of its files."""
        files = sorted(path for path in self.path.iterdir() if path.is_file())
        return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]

    @cached_property
    def info(self) -> dict[str, Any]:
        """What this project's training wrote beside the weights; empty for another's checkpoint.

        Raises:
            ConvertError: the file is not what training writes.
        """
        path = self.path / "info.json"
        if not path.is_file():
            return {}
        try:
            found = json.loads(path.read_text())
            found["config"]["model"], found["vocabulary"]["size"], found["vocabulary"]["eod_id"]  # noqa: B018
        except (ValueError, LookupError, TypeError) as error:
            raise ConvertError(f"{path} is not what training writes ({error!r}): copy the checkpoint whole.") from error
        return found

    @cached_property
    def args(self) -> dict[str, Any]:
        """Megatron-LM's arguments; empty where there are none."""
        path = self.path / "common.pt"
        if path.is_file():
            return read_args(path.read_bytes(), path)
        if self._common is None:
            return {}
        with self._common.path.open("rb") as file:
            file.seek(self._common.start)
            return read_args(file.read(self._common.length), self._common.path)

    @cached_property
    def architecture(self) -> Architecture:
        """The model that the checkpoint was written with.

        Raises:
            ConvertError: it does not say, or says what this version cannot read.
        """
        if self.info:
            try:
                model = TypeAdapter(ModelConfig).validate_python(self.info["config"]["model"])
                experts = self.info.get("experts")
                return Architecture(model=model, experts=experts and TypeAdapter(Experts).validate_python(experts))
            except ValidationError as error:
                problems = explain(error, ModelConfig)
                raise ConvertError(
                    f"{self.path / 'info.json'} describes no model of this version: {problems}"
                ) from error
        if self.args:
            return architecture_of_args(self.args)
        raise ConvertError(
            f"{self.path} has neither this project's info.json nor Megatron-LM's arguments in common.pt: nothing says "
            "what the weights mean."
        )

    @property
    def model(self) -> ModelConfig:
        """The model's section of the configuration that the checkpoint was written with."""
        return self.architecture.model

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary, without padding."""
        if self.info:
            return self.info["vocabulary"]["size"]
        size, _ = vocabulary_of_args(self.args)
        return size or self.shape("embedding.word_embeddings.weight")[0]

    @property
    def weights_dtype(self) -> torch.dtype:
        """Of its matrices; gates and norms may be wider."""
        return self.dtype("embedding.word_embeddings.weight")

    @property
    def eod_id(self) -> int | None:
        """Id of the end of a document; None where nothing says it."""
        return self.info["vocabulary"]["eod_id"] if self.info else vocabulary_of_args(self.args)[1]

    @property
    def sequence_length(self) -> int:
        """Tokens of a sample in training."""
        if self.info:
            return self.info["config"]["training"]["sequence_length"]
        return self.args.get("max_position_embeddings") or self.args["seq_length"]

    @property
    def step(self) -> int | None:
        """Optimizer steps done."""
        found = re.fullmatch(r"(?:step|iter)_(\d+)", self.path.name)
        return int(found[1]) if found else self.info.get("step")


def _read_metadata(path: Path) -> Metadata:
    try:
        return read_metadata(path)
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, LookupError) as error:
        raise ConvertError(f"{path} cannot be read ({error!r}): copy the checkpoint whole.") from error


def find_checkpoint(path: Path) -> Path:
    """The folder with `.metadata`: the path itself, or the newest step of a run's.

    Raises:
        ConvertError: none there.
    """
    for folder in (path, path / "checkpoints"):
        if (folder / ".metadata").is_file():
            return folder
        steps = sorted(folder.glob("step_*/manifest.json"))
        if steps:
            return steps[-1].parent
        latest = folder / "latest_checkpointed_iteration.txt"
        if latest.is_file():
            name = latest.read_text().strip()
            found = folder / (f"iter_{int(name):07d}" if name.isdigit() else "release")
            if (found / ".metadata").is_file():
                return found
            raise ConvertError(f"{latest} names {name}, and {found} holds no torch_dist checkpoint.")
    remedy = "name a step_... or iter_... folder, or the folder of a run"
    if not path.exists():
        raise ConvertError(f"{path} does not exist: {remedy}.")
    if (path / "config.json").is_file():
        remedy = "it is a Hugging Face folder, which tools.convert.hf_to_megatron reads"
    raise ConvertError(f"{path} holds no checkpoint: {remedy}.")


def _split(key: str) -> tuple[str, int | None]:
    """Name of the tensor, and which expert of it."""
    name, _, expert = key.partition("#")
    return name, int(expert) if expert else None


class _Part(io.RawIOBase):
    """A part of a file as a file, from which torch reads straight into a tensor."""

    def __init__(self, file: BinaryIO, start: int, length: int):
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(view)
        self._at += count
        return count


def _read_chunk(chunk: _Chunk, key: str) -> Tensor:
    if chunk.start + chunk.length > chunk.path.stat().st_size:
        raise ConvertError(f"{chunk.path} ends inside {key}: copy the checkpoint whole.")
    try:
        with chunk.path.open("rb") as file:
            return torch.load(_Part(file, chunk.start, chunk.length), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpointError(f"{key} in {chunk.path} is refused: {named_global(error)}") from error
    except (RuntimeError, EOFError) as error:
        raise ConvertError(f"{key} in {chunk.path} cannot be read ({error}): copy the checkpoint whole.") from error
