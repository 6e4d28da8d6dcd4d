"""Text to token ids in worker processes. Imports nothing heavy: every worker pays for it."""

import hashlib
import multiprocessing
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from tools.preprocess.readers import ArgumentError, InputError, Record, read_text


@dataclass(frozen=True, kw_only=True)
class Specification:
    """What turns records into tokens; with the records it determines the output.

    tokenizer: folder with `tokenizer.json`.
    text_key: key of the text in JSON records.
    eod_id: id that is put after every document; None for none.
    special_in_text: "error", "escape" or "allow", for text that contains a special token's string.
    validation_percent: share of the documents, chosen by their hash, that goes to validation.
    """

    tokenizer: str
    text_key: str
    eod_id: int | None
    special_in_text: str
    validation_percent: float


@dataclass(kw_only=True)
class Encoded:
    """Tokens of some records.

    ids: of each document, with the end-of-document id.
    in_validation: of each document.
    num_bytes: of text.
    problems: what is wrong with each record that gave no document.
    """

    ids: list[np.ndarray] = field(default_factory=list)
    in_validation: list[bool] = field(default_factory=list)
    num_bytes: int = 0
    problems: list[str] = field(default_factory=list)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a Hugging Face folder; only `tokenizer.json` is read, no code runs.

    It never truncates or pads, whatever the file says.

    Raises:
        ArgumentError: no `tokenizer.json`, or one that cannot be read.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ArgumentError(
            f"--tokenizer ({folder}) must be a folder with tokenizer.json (tokenizers that need code of their own are "
            "not run): make one with python -m tools.preprocess.train_tokenizer, or save a fast tokenizer of "
            "Hugging Face."
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ArgumentError(f"{path} cannot be read as a tokenizer ({error}): save it again.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id, which a vocabulary with gaps has above its number of tokens."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


_tokenizer: Tokenizer
_specification: Specification
_special: list[str]
_dtype: type


def start_worker(specification: Specification) -> None:
    """Load the tokenizer once per process; the process ends with the one that started it."""
    global _tokenizer, _specification, _special, _dtype
    _specification = specification
    _tokenizer = load_tokenizer(Path(specification.tokenizer))
    _tokenizer.encode_special_tokens = specification.special_in_text == "escape"
    _special = [token.content for token in _tokenizer.get_added_tokens_decoder().values() if token.special]
    _dtype = np.uint16 if vocabulary_size(_tokenizer) < 65500 else np.int32  # Megatron's rule
    # A worker of a killed parent would wait for tasks for ever.
    if multiprocessing.parent_process() is not None:
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def encode(records: list[Record]) -> Encoded:
    """Token ids of records, in order; needs `start_worker`.

    The tokenizer's own beginning and end tokens are not added: a document is its text and `eod_id`.
    """
    result, documents = Encoded(), []
    for record in records:
        try:
            documents.append((record, _checked_text(record)))
        except InputError as error:
            result.problems.append(str(error))
    encodings = _tokenizer.encode_batch_fast([text for _, text in documents], add_special_tokens=False)
    for (record, text), encoding in zip(documents, encodings, strict=True):
        if not encoding.ids:
            result.problems.append(f"{record.place}: the tokenizer makes no token of the text.")
            continue
        ids = encoding.ids if _specification.eod_id is None else [*encoding.ids, _specification.eod_id]
        result.ids.append(np.array(ids, dtype=_dtype))
        raw = text.encode()
        share = int.from_bytes(hashlib.sha256(raw).digest()[:8], "little") / 2**64
        result.in_validation.append(share * 100 < _specification.validation_percent)
        result.num_bytes += len(raw)
    return result


def _checked_text(record: Record) -> str:
    text = read_text(record, _specification.text_key)
    if _specification.special_in_text == "error":
        for token in _special:
            if token in text:
                raise InputError(
                    f"{record.place}: the text contains the special token {token}, which would end a document in the "
                    "middle: use --special-in-text escape to encode it as text, or allow to keep it as the token."
                )
    return text
