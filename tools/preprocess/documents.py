"""Choosing documents of datasets by their contents, and writing the chosen ones in any order."""

import hashlib

import numpy as np

from megatron_gdn.training.indexed import DatasetError, IndexedFiles
from tools.preprocess.indexed import IndexedWriter

_HASH_BYTES = 16
_DOCUMENTS_PER_WRITE = 4096


def document_hashes(datasets: list[IndexedFiles]) -> np.ndarray:
    """BLAKE2b of the stored tokens of each document, [documents of all] of 16 bytes.

    The same text gives the same hash in datasets of the same tokenizer, whatever file or position it is at.
    """
    hashes = np.empty(sum(files.num_documents for files in datasets), f"V{_HASH_BYTES}")
    i = 0
    for files in datasets:
        tokens, starts, lengths = _arrays(files)
        for begin in range(0, files.num_documents, _DOCUMENTS_PER_WRITE):
            block = slice(begin, begin + _DOCUMENTS_PER_WRITE)
            found = [
                hashlib.blake2b(tokens[start : start + length], digest_size=_HASH_BYTES).digest()
                for start, length in zip(starts[block].tolist(), lengths[block].tolist(), strict=True)
            ]
            hashes[i : i + len(found)] = np.frombuffer(b"".join(found), hashes.dtype)
            i += len(found)
    return hashes


def first_of_each(hashes: np.ndarray) -> np.ndarray:
    """Numbers of the documents whose hash no earlier document has, in order, [kept] int64."""
    words = hashes.view(np.uint64).reshape(-1, 2)
    # Stable, so that equal hashes stay in the order of their documents.
    order = np.lexsort((words[:, 1], words[:, 0]))
    new = np.ones(len(order), bool)
    new[1:] = (words[order[1:]] != words[order[:-1]]).any(axis=1)
    return np.sort(order[new])


def shares_of(hashes: np.ndarray, shares: list[float]) -> np.ndarray:
    """Which share each document belongs to, by its hash, [documents] int64.

    Args:
        shares: fractions with sum 1; number i gets about that fraction of the documents.
    """
    position = hashes.view(np.uint64).reshape(-1, 2)[:, 0] / 2.0**64
    return np.searchsorted(np.cumsum(shares[:-1]), position, side="right")


def write_documents(datasets: list[IndexedFiles], order: np.ndarray, writer: IndexedWriter) -> None:
    """Append documents to a writer.

    Args:
        order: [chosen] int64, numbers of documents, counted through all datasets.
    """
    first = np.cumsum([0] + [files.num_documents for files in datasets])
    arrays = [_arrays(files) for files in datasets]
    for i in range(0, len(order), _DOCUMENTS_PER_WRITE):
        block = order[i : i + _DOCUMENTS_PER_WRITE]
        owners = np.searchsorted(first, block, side="right") - 1
        pieces = []
        for owner, number in zip(owners.tolist(), (block - first[owners]).tolist(), strict=True):
            tokens, starts, lengths = arrays[owner]
            pieces.append(tokens[starts[number] : starts[number] + lengths[number]])
        writer.add(np.concatenate(pieces), np.fromiter(map(len, pieces), np.int64, len(pieces)))


def _arrays(files: IndexedFiles) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, and the first token and number of tokens of each document."""
    if files.num_sequences != files.num_documents:
        raise DatasetError(
            f"{files.prefix} has {files.num_sequences} sequences in {files.num_documents} documents, and only "
            "documents of one sequence can be chosen: tokenize it with tokenize_corpus."
        )
    return files.tokens(), files.starts() // files.dtype.itemsize, files.lengths()
