"""Training text straight from WebDataset shards (tar files), tokenised while it is read.

For corpora that are in tar shards anyway and are read once; `tools.preprocess.tokenize_corpus` makes indexed binaries
of them, which shuffle documents and open at any place.

Sample n is a function of the shards, the tokenizer and the seed alone, so one number is the position, as with indexed
datasets, at every layout and number of reading processes:

    lane l of L                 samples l, l + L, l + 2 L, ...; L is the global batch size, so that a rank reads only
                                the shards of its own samples
    epoch e of a lane           every L-th shard of that epoch's order, which the seed draws; where there are fewer
                                shards than lanes, every k-th document of one shard
    text of a lane              documents in the order of the shards, each with its end-of-document id; sample i holds
                                its tokens from i s to (i + 1) s, and the next one as the last label

A process that goes on with sample n skips whole shards, whose numbers of tokens it keeps in a folder after it has read
them once, and tokenises again only within one shard.
"""

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from megatron_gdn.config import DataConfig
from megatron_gdn.optional import require
from megatron_gdn.training.indexed import DatasetError
from megatron_gdn.training.packing import Batch, keep_apart
from megatron_gdn.training.tokenizer_json import read_tokenizer, vocabulary_size

_BATCH_DOCUMENTS = 64
_TAR_END = bytes(1024)  # a tar file ends with two empty records


@dataclass(frozen=True, kw_only=True)
class TextShards:
    """Shards and how their text becomes tokens.

    paths: of the tar files, sorted.
    tokenizer: folder with `tokenizer.json`.
    field: of each sample that holds the text, UTF-8, such as "txt".
    eod_id: id that is put after every document.
    vocab_size: number of the tokenizer's ids.
    tokenizer_sha256: of `tokenizer.json`, as in the manifests of indexed datasets.
    """

    paths: tuple[str, ...]
    tokenizer: str
    field: str
    eod_id: int
    vocab_size: int
    tokenizer_sha256: str

    def key(self, path: str) -> str:
        """A name for what a shard becomes: another file under the same path, or another tokenizer, gets another."""
        facts = os.stat(path)
        parts = (path, facts.st_size, facts.st_mtime_ns, self.tokenizer_sha256, self.field, self.eod_id)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def find_shards(data: DataConfig) -> TextShards:
    """The shards that `data.train` names, after checking that each is a whole tar file.

    Args:
        data: with local paths ending in .tar, which may hold `*`, `?`, `[...]` and `**`. Of the tokenizer's folder only
            `tokenizer.json` is read, no code runs.

    Raises:
        DatasetError: a pattern without files, a URL, a file that is cut off, a tokenizer that cannot be read or has no
            such token.
        MissingPackageError: webdataset is not installed.
    """
    require("webdataset", extra="preprocess", purpose=f"data.train ({data.train[0]})")
    paths: set[str] = set()
    for entry in data.train:
        found = [] if "://" in entry or entry.startswith("pipe:") else glob.glob(entry, recursive=True)
        if not found:
            raise DatasetError(f"data.train ({entry}) names no file: give local tar files, and quote a pattern.")
        paths |= set(found)
    for path in sorted(paths):
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - len(_TAR_END)))
            if size % 512 or file.read() != _TAR_END:
                raise DatasetError(f"{path} is not a whole tar file (its end is missing): copy it again.")
    file = Path(data.tokenizer) / "tokenizer.json"
    try:
        loaded = read_tokenizer(file)
    except ValueError as error:
        raise DatasetError(f"{error}: name the folder of one.") from error
    eod_id = loaded.token_to_id(data.eod_token)
    if eod_id is None:
        raise DatasetError(f"data.eod_token ({data.eod_token}) must be a token of {file}: name one that it has.")
    return TextShards(
        paths=tuple(sorted(paths)),
        tokenizer=data.tokenizer,
        field=data.text_field,
        eod_id=eod_id,
        vocab_size=vocabulary_size(loaded),
        tokenizer_sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
    )


def read_texts(path: str, field: str) -> Iterator[str]:
    """The texts of a shard's samples, in its order; other fields are passed over as they are.

    Raises:
        DatasetError: a sample without the field, text that is not UTF-8, a broken tar file.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    # Opened here: by name webdataset would also run commands and fetch URLs. Nothing is decoded, so nothing unpickled.
    with open(path, "rb") as stream:
        samples = group_by_keys(tar_file_expander([{"url": path, "stream": stream}]))
        while True:
            try:
                sample = next(samples)
            except StopIteration:
                return
            except Exception as error:
                raise DatasetError(f"{path} cannot be read ({error}): copy it again.") from error
            name = f"{path} sample {sample['__key__']}"
            if field not in sample:
                fields = ", ".join(key for key in sample if not key.startswith("__"))
                raise DatasetError(f"{name} has no field data.text_field ({field}); it has {fields}.")
            try:
                yield sample[field].decode()
            except UnicodeDecodeError as error:
                raise DatasetError(f"{name} is not UTF-8 ({error.reason} at byte {error.start}).") from error


class StreamedDataset(Dataset):
    """Samples of tokenised shards, by number; quick where each lane is read in rising order.

    Of several processes that read ahead each tokenises the lanes of its own micro-batches; where the micro-batches of a
    step are no multiple of the processes, a lane is tokenised by more than one of them.

    Args:
        shards: from `find_shards`.
        num_samples: to provide, over as many epochs as they take.
        num_lanes: L, the global batch size.
        sequence_length: s, tokens of a sample.
        seed: of the order of the shards.
        cache_dir: folder for the numbers of tokens of shards; may be empty or shared.
        documents: "join", or "separate" for bounds in `position_ids` and `loss_mask`, see `keep_apart`.
        eod_mask_loss: leave the prediction after the end-of-document id out of the loss.
    """

    def __init__(
        self,
        shards: TextShards,
        *,
        num_samples: int,
        num_lanes: int,
        sequence_length: int,
        seed: int,
        cache_dir: Path,
        documents: str = "join",
        eod_mask_loss: bool = False,
    ):
        self._shards, self._num_samples, self._num_lanes = shards, num_samples, num_lanes
        self._length, self._seed, self._separate = sequence_length, seed, documents == "separate"
        self._eod_mask_loss = eod_mask_loss
        self._counts = TokenCounts(cache_dir)
        self._lanes: dict[int, _Lane] = {}
        self._tokenizer: Tokenizer | None = None

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, idx: int) -> Batch:
        """One sample, in the form of GPTDataset's."""
        lane, start = idx % self._num_lanes, idx // self._num_lanes * self._length
        if lane not in self._lanes or self._lanes[lane].position > start:
            self._lanes[lane] = _Lane(self._parts(lane))
        text, lengths = self._lanes[lane].take(start, self._length + 1)
        tokens, labels = torch.from_numpy(text[:-1]), torch.from_numpy(text[1:])
        mask = torch.ones(self._length)
        if self._eod_mask_loss:
            mask[tokens == self._shards.eod_id] = 0.0
        sample = dict(tokens=tokens, labels=labels, loss_mask=mask, position_ids=torch.arange(self._length))
        return keep_apart(sample, lengths) if self._separate else sample

    def _parts(self, lane: int) -> Iterator["_Part"]:
        """Shards, or parts of shards, of a lane, over epochs without end."""
        num_shards, epoch = len(self._shards.paths), 0
        while True:
            order = np.random.default_rng([self._seed, epoch]).permutation(num_shards)
            mine, first, step = order[lane :: self._num_lanes], 0, 1
            if num_shards < self._num_lanes:
                # Lanes l, l + N, l + 2 N, ... share a shard.
                mine, first = order[lane % num_shards, None], lane // num_shards
                step = len(range(lane % num_shards, self._num_lanes, num_shards))
            for number in mine:
                yield _Part(self, self._shards.paths[number], first, step)
            epoch += 1

    def encode(self, path: str, first: int, step: int) -> Iterator[np.ndarray]:
        """Token ids of every `step`-th document of a shard, counted from `first`, with the end-of-document id."""
        if self._tokenizer is None:  # in the process that reads
            self._tokenizer = read_tokenizer(Path(self._shards.tokenizer) / "tokenizer.json")
            # The text of a special token is text: an end of document in the middle would be a false bound.
            self._tokenizer.encode_special_tokens = True
        batch: list[str] = []
        for number, text in enumerate(read_texts(path, self._shards.field)):
            if number % step == first:
                batch.append(text)
            if len(batch) == _BATCH_DOCUMENTS:
                yield from self._encode_batch(batch)
                batch = []
        yield from self._encode_batch(batch)

    def _encode_batch(self, texts: list[str]) -> Iterator[np.ndarray]:
        for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            if not encoding.ids:  # an empty text
                continue
            yield np.array([*encoding.ids, self._shards.eod_id], dtype=np.int64)


class _Part:
    """A shard, or every `step`-th document of it, as a lane reads it."""

    def __init__(self, dataset: StreamedDataset, path: str, first: int, step: int):
        self._dataset, self._path, self._first, self._step = dataset, path, first, step
        self._name = f"{dataset._shards.key(path)}-{first}-{step}"

    def num_tokens(self) -> int | None:
        """None before it was read once."""
        return self._dataset._counts.get(self._name)

    def documents(self) -> Iterator[np.ndarray]:
        """Its documents' tokens; the number of tokens is kept when all are read."""
        total = 0
        for document in self._dataset.encode(self._path, self._first, self._step):
            total += len(document)
            yield document
        self._dataset._counts.put(self._name, total)


class _Lane:
    """A lane's text from some position on.

    position: of the first token that can still be taken.
    """

    def __init__(self, parts: Iterator[_Part]):
        self._parts, self._documents = parts, iter(())
        self._buffer: list[np.ndarray] = []
        self.position = 0

    def take(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens `start` to `start + length`, and the lengths of the documents' parts among them.

        All but the last token are gone then: the next sample starts with it.
        """
        self._skip_to(start)
        pieces, missing = [], length
        while missing:
            if not self._buffer:
                self._buffer.append(self._next_document())
            piece = self._buffer[0][:missing]
            pieces.append(piece)
            missing -= len(piece)
            if missing:
                self._buffer.pop(0)
        # The last piece's document stays from its last taken token on.
        self._buffer[0] = self._buffer[0][len(pieces[-1]) - 1 :]
        self.position = start + length - 1
        return np.concatenate(pieces), np.array([len(piece) for piece in pieces])

    def _skip_to(self, start: int) -> None:
        while self.position < start:
            if self._buffer:
                document = self._buffer.pop(0)
                skipped = min(len(document), start - self.position)
                if skipped < len(document):
                    self._buffer.append(document[skipped:])
                self.position += skipped
                continue
            self._buffer.append(self._next_document(start - self.position))

    def _next_document(self, skippable: int = 0) -> np.ndarray:
        """The next document; shards of at most `skippable` tokens in front of it are passed over by their number."""
        num_empty = 0
        while True:
            for document in self._documents:
                return document
            part = next(self._parts)
            known = part.num_tokens()
            num_empty = num_empty + 1 if known == 0 else 0
            if num_empty > 1000:
                raise DatasetError(f"{part._path} and the shards before it hold no documents: give data.train text.")
            if known is not None and known <= skippable:
                self.position += known
                skippable -= known
                continue
            self._documents = part.documents()


class TokenCounts:
    """Numbers that are kept in a folder, one small file each; several processes may write the same.

    Args:
        folder: is made on the first `put`.
    """

    def __init__(self, folder: Path):
        self._folder = Path(folder)

    def get(self, name: str) -> int | None:
        """The number, or None."""
        try:
            return int((self._folder / name).read_text())
        except (FileNotFoundError, ValueError):
            return None

    def put(self, name: str, value: int) -> None:
        """Keep a number; complete or not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        aside = self._folder / f".{name}.{os.getpid()}"
        aside.write_text(str(value))
        aside.replace(self._folder / name)
