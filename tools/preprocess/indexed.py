"""Writing datasets in Megatron's format, `<prefix>.bin` and `<prefix>.idx`, with memory that no size changes.

The index: `MMIDIDX\\0\\0`, u64 version 1, u8 code of the dtype, u64 sequences, u64 documents + 1, then int32 lengths,
int64 starts in bytes and int64 first sequences of the documents. Source: megatron-core, datasets/indexed_dataset.py.
"""

import fcntl
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_gdn.training.indexed import IndexedFiles
from tools.preprocess.sources import InputError

_CODES = {np.dtype(np.uint16): 8, np.dtype(np.int32): 4}
_BLOCK = 2**20
_COPY_BYTES = 2**24


def optimal_dtype(vocab_size: int) -> np.dtype:
    """Megatron's rule: 16 bits for less than 65500 ids."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def sha256_of(path: Path, start: int = 0, num_bytes: int | None = None) -> str:
    """Hash of a file's contents or of a part of it, hexadecimal."""
    digest = hashlib.sha256()
    remaining = os.path.getsize(path) - start if num_bytes is None else num_bytes
    with Path(path).open("rb") as file:
        file.seek(start)
        while remaining and (block := file.read(min(2**22, remaining))):
            digest.update(block)
            remaining -= len(block)
    return digest.hexdigest()


class IndexedWriter:
    """Writes documents of one sequence each; the lengths wait in a file, so memory does not grow.

    Args:
        bin_path, idx_path: the files, which exist only as far as they are written until `finish`.
        dtype: of the tokens.
        part_bytes: each so many bytes of tokens get a checksum of their own.
    """

    def __init__(self, bin_path: Path, idx_path: Path, dtype: np.dtype, part_bytes: int = 2**28):
        self._bin, self._idx_path, self.dtype = bin_path.open("wb"), idx_path, np.dtype(dtype)
        self._lengths_path = idx_path.with_name(idx_path.name + ".lengths")
        self._lengths = self._lengths_path.open("wb+")
        self._part_bytes, self._digest, self._in_part = part_bytes, hashlib.sha256(), 0
        self.parts: list[tuple[int, str]] = []
        self.num_documents = self.num_tokens = 0
        self.max_token_id = -1

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents.

        Args:
            ids: of all of them, [sum(lengths)], of the dtype.
            lengths: tokens of each, [documents].
        """
        if not len(lengths):
            return
        data = memoryview(np.ascontiguousarray(ids, self.dtype)).cast("B")
        self._bin.write(data)
        while len(data):
            piece = data[: self._part_bytes - self._in_part]
            self._digest.update(piece)
            self._in_part += len(piece)
            data = data[len(piece) :]
            if self._in_part == self._part_bytes:
                self._end_part()
        self._lengths.write(np.asarray(lengths, np.int32).tobytes())
        self.num_documents += len(lengths)
        self.num_tokens += len(ids)
        self.max_token_id = max(self.max_token_id, int(ids.max()))

    def finish(self) -> dict[str, Any]:
        """Write the index and close the files.

        Returns:
            What a manifest says of both files and their contents.
        """
        self._end_part()
        self._lengths.flush()
        lengths = np.memmap(self._lengths_path, np.int32, "r") if self.num_documents else np.zeros(0, np.int32)
        idx_sha256 = write_index(
            self._idx_path,
            dtype=self.dtype,
            num_sequences=self.num_documents,
            num_documents=self.num_documents,
            lengths=lambda: blocks_of(lengths),
            documents=lambda: (np.arange(i, min(i + _BLOCK, self.num_documents)) for i in self._steps()),
        )
        self.close()
        return contents(
            num_documents=self.num_documents,
            num_tokens=self.num_tokens,
            max_token_id=self.max_token_id,
            dtype=self.dtype,
            parts=self.parts,
            idx_bytes=self._idx_path.stat().st_size,
            idx_sha256=idx_sha256,
        )

    def close(self) -> None:
        """Close the files, also half-written ones."""
        self._bin.close()
        self._lengths.close()
        self._lengths_path.unlink(missing_ok=True)

    def _end_part(self) -> None:
        if self._in_part:
            self.parts.append((self._in_part, self._digest.hexdigest()))
        self._digest, self._in_part = hashlib.sha256(), 0

    def _steps(self) -> range:
        return range(0, self.num_documents, _BLOCK)


def contents(
    *,
    num_documents: int,
    num_tokens: int,
    max_token_id: int,
    dtype: np.dtype,
    parts: list[tuple[int, str]],
    idx_bytes: int,
    idx_sha256: str,
) -> dict[str, Any]:
    """The part of a manifest that describes the two files.

    Args:
        parts: bytes and SHA-256 of pieces of .bin, in order; pieces, so that merging needs to read no token again.
    """
    return {
        "format_version": 2,
        "documents": num_documents,
        "tokens": num_tokens,
        "max_token_id": max_token_id,
        "dtype": np.dtype(dtype).name,
        "files": {
            "bin": {"bytes": num_tokens * np.dtype(dtype).itemsize, "parts": [list(part) for part in parts]},
            "idx": {"bytes": idx_bytes, "sha256": idx_sha256},
        },
    }


def write_index(
    path: Path,
    *,
    dtype: np.dtype,
    num_sequences: int,
    num_documents: int,
    lengths: Callable[[], Iterable[np.ndarray]],
    documents: Callable[[], Iterable[np.ndarray]],
) -> str:
    """Write an index block by block.

    Args:
        lengths: gives the blocks of the lengths of the sequences, each time it is called.
        documents: gives the blocks of each document's first sequence, without the last entry.

    Returns:
        Its SHA-256.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(data: bytes) -> None:
            file.write(data)
            digest.update(data)

        header = struct.pack("<9sQBQQ", b"MMIDIDX", 1, _CODES[np.dtype(dtype)], num_sequences, num_documents + 1)
        put(header)
        for block in lengths():
            put(np.ascontiguousarray(block, np.int32).tobytes())
        start = 0
        for block in lengths():
            ends = np.cumsum(block, dtype=np.int64) * np.dtype(dtype).itemsize + start
            put(np.concatenate([[start], ends[:-1]]).astype(np.int64).tobytes())
            start = int(ends[-1])
        for block in documents():
            put(np.ascontiguousarray(block, np.int64).tobytes())
        put(struct.pack("<q", num_sequences))
    return digest.hexdigest()


def blocks_of(array: np.ndarray) -> Iterator[np.ndarray]:
    """Pieces of an array, for reading mapped ones with bounded memory."""
    return (array[i : i + _BLOCK] for i in range(0, len(array), _BLOCK))


def concatenate(parts: list[IndexedFiles], bin_path: Path, idx_path: Path) -> str:
    """Write the datasets one after the other as one dataset; they must have the same dtype, and tokens.

    Returns:
        SHA-256 of the index.
    """
    with bin_path.open("wb") as file:
        for part in parts:
            with Path(f"{part.prefix}.bin").open("rb") as source:
                _copy(source, file)

    def lengths() -> Iterator[np.ndarray]:
        for part in parts:
            yield from blocks_of(part.lengths())

    def documents() -> Iterator[np.ndarray]:
        first = 0
        for part in parts:
            for block in blocks_of(part.documents()[:-1]):
                yield block + first
            first += part.num_sequences

    return write_index(
        idx_path,
        dtype=parts[0].dtype,
        num_sequences=sum(part.num_sequences for part in parts),
        num_documents=sum(part.num_documents for part in parts),
        lengths=lengths,
        documents=documents,
    )


class Output:
    """The names of one dataset: written aside, complete under their names or not there; a context manager.

    Leaving the context without `commit` removes what was written aside; the dataset of this name, if any, stays as it
    was. A killed process leaves only the files aside, which the next one for this name replaces.

    Raises:
        InputError: another process writes the same dataset.
    """

    def __init__(self, prefix: str):
        self.prefix = prefix
        self._paths = {suffix: Path(f"{prefix}.{suffix}") for suffix in ("bin", "idx", "json")}
        self._aside = {suffix: path.with_name(f".{path.name}.writing") for suffix, path in self._paths.items()}
        self.bin, self.idx = self._aside["bin"], self._aside["idx"]
        self._paths["bin"].parent.mkdir(parents=True, exist_ok=True)
        self._manifest = self._lock()

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *error) -> None:
        if self._manifest.closed:
            return
        for path in self._aside.values():
            path.unlink(missing_ok=True)
        self._manifest.close()

    def commit(self, manifest: dict[str, Any] | None) -> None:
        """Give the files their names, the manifest last.

        Args:
            manifest: None for a dataset without one.
        """
        for suffix in ("bin", "idx"):
            _sync(self._aside[suffix])
        self._manifest.truncate(0)
        if manifest is not None:
            self._manifest.write(json.dumps(manifest, indent=1) + "\n")
            self._manifest.flush()
            os.fsync(self._manifest.fileno())
        # Without its manifest and index, an older dataset of this name cannot be taken for a mixture of both.
        for suffix in ("json", "idx"):
            self._paths[suffix].unlink(missing_ok=True)
        for suffix in ("bin", "idx", "json")[: 3 if manifest is not None else 2]:
            os.replace(self._aside[suffix], self._paths[suffix])
        self._aside["json"].unlink(missing_ok=True)
        _sync(self._paths["bin"].parent)
        self._manifest.close()

    def _lock(self):
        """Open the manifest aside and lock it; the lock goes when the process does."""
        file = self._aside["json"].open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise InputError(
                f"{self.prefix} is being written by another process: wait for it or choose another prefix."
            ) from error
        return file


def write_json(path: Path, value: Any) -> None:
    """Write JSON aside and rename it."""
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(aside, path)


def _copy(source: BinaryIO, target: BinaryIO) -> None:
    """Append a file to another, inside the kernel where the file system can."""
    target.flush()
    while True:
        try:
            if not os.copy_file_range(source.fileno(), target.fileno(), _COPY_BYTES):
                return
        except (OSError, AttributeError):  # between file systems, on one that has no such call, on macOS
            while block := source.read(_COPY_BYTES):
                target.write(block)
            target.flush()
            return


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
