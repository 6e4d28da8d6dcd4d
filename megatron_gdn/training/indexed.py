"""Indexed datasets on disk: whether their files are whole, without reading the tokens.

A dataset is a pair `<prefix>.bin`, `<prefix>.idx` (Megatron's format) and usually a manifest `<prefix>.json` that the
preprocessing wrote. Megatron itself opens a cut or replaced .bin and reads what is not there: without memory mapping
that is uninitialised memory, as tokens, without an error. So every dataset is checked here before Megatron sees it.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER_BYTES = 34
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_SCAN_TOKENS = 2**24
_REMEDY = "build the dataset again or copy it whole"


class DatasetError(ValueError):
    """Data that is missing, broken, or does not fit the model."""


@dataclass(frozen=True, kw_only=True)
class IndexedFiles:
    """A dataset whose files agree with each other.

    prefix: path without suffix.
    dtype: of the tokens.
    num_sequences: pieces that the index lists; one per document, as the preprocessing writes them.
    num_documents: as it says.
    num_tokens: of all.
    manifest: what the preprocessing recorded; empty when there is none.
    """

    prefix: str
    dtype: np.dtype
    num_sequences: int
    num_documents: int
    num_tokens: int
    manifest: dict[str, Any]

    def tokens(self) -> np.ndarray:
        """All tokens, [num_tokens], mapped."""
        return np.memmap(f"{self.prefix}.bin", dtype=self.dtype, mode="r")

    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, [num_sequences] int32, mapped."""
        return self._index_array(_HEADER_BYTES, np.int32, self.num_sequences)

    def starts(self) -> np.ndarray:
        """Where each sequence starts in .bin, in bytes, [num_sequences] int64, mapped."""
        return self._index_array(_HEADER_BYTES + 4 * self.num_sequences, np.int64, self.num_sequences)

    def documents(self) -> np.ndarray:
        """First sequence of each document, and the end, [num_documents + 1] int64, mapped."""
        return self._index_array(_HEADER_BYTES + 12 * self.num_sequences, np.int64, self.num_documents + 1)

    def scan_max_token_id(self) -> int:
        """Largest token id, by reading every token once."""
        tokens = self.tokens()
        return max(int(tokens[i : i + _SCAN_TOKENS].max()) for i in range(0, len(tokens), _SCAN_TOKENS))

    def _index_array(self, offset: int, dtype: type, length: int) -> np.ndarray:
        return np.memmap(f"{self.prefix}.idx", dtype=dtype, mode="r", offset=offset, shape=(length,))


def check_dataset(prefix: str) -> IndexedFiles:
    """Check that a dataset is whole: headers and sizes, not the tokens.

    Args:
        prefix: path without `.bin`.

    Raises:
        DatasetError: a missing file, a header that is not Megatron's, sizes that do not agree with each other or with
            the manifest.
    """
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for path in (bin_path, idx_path):
        if not path.is_file():
            remedy = "build it with python -m tools.preprocess.tokenize_corpus"
            if Path(prefix).suffix in (".bin", ".idx") and Path(prefix).is_file():
                remedy = f"a dataset is named without {Path(prefix).suffix}"
            raise DatasetError(f"{path} does not exist: {remedy}.")
    idx_bytes, bin_bytes = idx_path.stat().st_size, bin_path.stat().st_size
    with idx_path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
        if len(header) < _HEADER_BYTES or header[: len(_MAGIC)] != _MAGIC:
            found = f"its first bytes are {header[: len(_MAGIC)]!r} and not {_MAGIC!r}"
            if header[: len(_MAGIC)] == _MAGIC:
                found = f"it has {len(header)} bytes and the header alone {_HEADER_BYTES}"
            raise DatasetError(f"{idx_path} is not an index of Megatron's ({found}): {_REMEDY}.")
        version, code, sequences, entries = struct.unpack("<QBQQ", header[len(_MAGIC) :])
        if version != 1 or code not in _DTYPES:
            raise DatasetError(
                f"{idx_path} has version {version} and dtype code {code}, and version 1 with one of the codes "
                f"{sorted(_DTYPES)} can be read: {_REMEDY}."
            )
        # A multimodal index has one more byte per sequence.
        expected = _HEADER_BYTES + 12 * sequences + 8 * entries
        if idx_bytes not in (expected, expected + sequences):
            raise DatasetError(f"{idx_path} has {idx_bytes} bytes and its header says {expected}: {_REMEDY}.")
        if sequences == 0:
            raise DatasetError(f"{idx_path} lists no documents: {_REMEDY}.")
        file.seek(_HEADER_BYTES + 4 * (sequences - 1))
        (last_length,) = struct.unpack("<i", file.read(4))
        file.seek(_HEADER_BYTES + 4 * sequences + 8 * (sequences - 1))
        (last_start,) = struct.unpack("<q", file.read(8))
    dtype = np.dtype(_DTYPES[code])
    expected = last_start + last_length * dtype.itemsize
    if bin_bytes != expected:
        raise DatasetError(f"{bin_path} has {bin_bytes} bytes and its index says {expected}: {_REMEDY}.")
    if bin_bytes == 0:
        raise DatasetError(f"{bin_path} has no tokens, and neither has its index: {_REMEDY}.")
    files = IndexedFiles(
        prefix=str(prefix),
        dtype=dtype,
        num_sequences=sequences,
        num_documents=entries - 1,
        num_tokens=bin_bytes // dtype.itemsize,
        manifest=_read_manifest(Path(f"{prefix}.json")),
    )
    if files.manifest:
        for path, found in ((bin_path, bin_bytes), (idx_path, idx_bytes)):
            recorded = files.manifest["files"][path.suffix[1:]]["bytes"]
            if found != recorded:
                raise DatasetError(f"{path} has {found} bytes and its manifest says {recorded}: {_REMEDY}.")
    return files


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_bytes())
        for name in ("eod_id", "skipped", "sources", "tokenizer_sha256"):
            manifest[name]
        for number in (manifest["vocab_size"], manifest["max_token_id"]):
            int(number)
        for suffix in ("bin", "idx"):
            int(manifest["files"][suffix]["bytes"])
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{path} is not a manifest of tokenize_corpus ({error!r}): build the dataset again, or remove this file to "
            "go without its checks."
        ) from error
    return manifest
