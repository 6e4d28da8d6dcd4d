"""One unit of input to one small dataset: a pure function, so that any process of any scheduler can run it."""

import contextlib
import functools
import hashlib
import json
import os
import re
import resource
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tools.preprocess.encode import Gigatoken, SpecialTokens, engine_version
from tools.preprocess.indexed import IndexedWriter, optimal_dtype, sha256_of, write_json
from tools.preprocess.libraries import Ids, open_tokenizer
from tools.preprocess.readers import Batch, DamagedError, Problem, UnitReader
from tools.preprocess.sources import InputError, Unit

_KEPT_PROBLEMS = 100
# Of every so many bytes of text, so many characters are compared with the reference: 1 or 2 % of the time.
_CHECKED_EVERY = 2**23
_CHECKED_CHARACTERS = 2000
# What a thread encodes at a time, or one longer text.
_THREADS_CHARACTERS = 2**15

# A batch, the ids and lengths of its documents, and the bytes of their texts.
_Encoded = tuple[Batch, np.ndarray, np.ndarray, int]


@dataclass(frozen=True, kw_only=True)
class Specification:
    """What turns the records of a unit into tokens; with the unit it determines every byte of the result.

    tokenizer: place that `open_tokenizer` takes.
    tokenizer_sha256, vocab_size: of it.
    engine: "gigatoken" or the name of the tokenizer's library.
    text_key, tar_field, max_document_bytes: see `UnitReader`.
    eod_id: id that is put after every document; None for none.
    special_in_text: "error", "escape" or "allow", for text that contains a special token's string.
    """

    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    engine: str
    text_key: str
    tar_field: str
    eod_id: int | None
    special_in_text: str
    max_document_bytes: int

    def describe(self) -> dict[str, Any]:
        """Its fields for JSON, with the engine's version and without the place, which may change."""
        facts = asdict(self)
        del facts["tokenizer"]
        return facts | {"engine": engine_version(self.engine)}


def key_of(unit: Unit, specification: Specification) -> str:
    """Name of a unit's result: another for another file, range, tokenizer or option."""
    facts = json.dumps([1, unit.describe(), specification.describe()], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:24]


def tokenize_unit(unit: Unit, specification: Specification, folder: Path, threads: int = 1) -> dict[str, Any]:
    """Tokenize a unit, or find it done.

    Writes `<key>.bin`, `<key>.idx` and, last, the record `<key>.json` into the folder. A result that is there already
    counts only if its checksums match.

    Args:
        threads: that encode; above 1 only where the engine is the tokenizer's own library. The result is the same.

    Returns:
        The record: what `contents` says of the files; `key`; `records` read; `text_bytes`; `sha256` of the unit's
        bytes; `problems`, counts by kind; `examples`, the first of them as (kind, number, message); `damaged`, why
        nothing of the file can be used, or None; `resumed`; `rss_mb`, the process's peak so far.

    Raises:
        InputError: the fast engine gives other ids than the tokenizer's own.
        OSError: a disk or a network that fails.
    """
    key = key_of(unit, specification)
    prefix = Path(folder) / key
    if (done := _committed(prefix)) is not None:
        return done | {"resumed": True, "rss_mb": _rss_mb()}
    encoder = _encoder(specification)
    reader = UnitReader(
        unit,
        text_key=specification.text_key,
        tar_field=specification.tar_field,
        max_document_bytes=specification.max_document_bytes,
    )
    # Two processes may do the same unit, when a scheduler takes one of them for lost: each writes its own files.
    aside = prefix.with_name(f".{key}.{os.getpid()}")
    names = {suffix: aside.with_name(f"{aside.name}.{suffix}") for suffix in ("bin", "idx")}
    writer = IndexedWriter(names["bin"], names["idx"], optimal_dtype(specification.vocab_size))
    counts, examples, text_bytes, damaged = Counter(), [], 0, None
    try:
        try:
            for batch, ids, lengths, num_bytes in encoder.encode_all(reader, unit.source.path, threads):
                text_bytes += num_bytes
                writer.add(ids, lengths)
                counts.update(problem.kind for problem in batch.problems)
                examples += sorted(batch.problems, key=lambda problem: problem.number)[: _KEPT_PROBLEMS - len(examples)]
        except DamagedError as error:
            damaged = str(error)
        facts = writer.finish()
    finally:
        writer.close()
    for suffix, path in names.items():
        os.replace(path, f"{prefix}.{suffix}")
    record = facts | {
        "key": key,
        "records": reader.num_records,
        "text_bytes": text_bytes,
        "sha256": reader.sha256,
        "problems": dict(sorted(counts.items())),
        "examples": [list(problem) for problem in examples],
        "damaged": damaged,
    }
    write_json(prefix.with_suffix(".json"), record)
    return record | {"resumed": False, "rss_mb": _rss_mb()}


def prepare(specification: Specification) -> None:
    """Make ready to tokenize by a specification, which may still turn out not to work."""
    with contextlib.suppress(ValueError, ImportError):
        _encoder(specification)


class _Encoder:
    """Encodes batches by a specification; lives as long as its process."""

    def __init__(self, specification: Specification):
        self._specification = specification
        allow = specification.special_in_text == "allow"
        self._reference = open_tokenizer(specification.tokenizer, allow_special=allow)
        if self._reference.sha256 != specification.tokenizer_sha256:
            raise InputError(f"{specification.tokenizer} changed while it was used: start again.")
        fast = specification.engine == "gigatoken"
        self._engine = Gigatoken(self._reference) if fast else self._reference
        self._special = SpecialTokens([] if allow else list(self._reference.special_tokens))
        self._dtype = optimal_dtype(specification.vocab_size)
        self._unchecked = _CHECKED_EVERY

    def encode_all(self, reader: Iterable[Batch], place: str, threads: int) -> Iterator[_Encoded]:
        """Batches in their order, or their parts, with ids and lengths of the documents and bytes of their texts."""
        if threads == 1:
            for batch in reader:
                yield batch, *self.encode(batch, place)
            return
        with ThreadPoolExecutor(threads) as pool:
            try:
                under_way = []
                for batch in reader:
                    before, under_way = under_way, self._submit(batch, place, pool)
                    yield from ((part, *future.result()) for part, future in before)
                yield from ((part, *future.result()) for part, future in under_way)
            finally:
                pool.shutdown(cancel_futures=True)

    def _submit(self, batch: Batch, place: str, pool: ThreadPoolExecutor) -> list[tuple[Batch, Future]]:
        """The parts of a batch under way, the longest first, so that the threads end together."""
        parts = list(batch.divide(_THREADS_CHARACTERS))
        by_length = sorted(range(len(parts)), key=lambda i: -sum(map(len, parts[i].texts)))
        futures = {i: pool.submit(self.encode, parts[i], place) for i in by_length}
        return [(part, futures[i]) for i, part in enumerate(parts)]

    def encode(self, batch: Batch, place: str) -> tuple[np.ndarray, np.ndarray, int]:
        """Ids and lengths of the documents, and bytes of their texts; what gives no document joins batch.problems."""
        texts, numbers = batch.texts, batch.numbers
        escaped = self._take_special(batch)
        parts = self._engine.encode(texts)
        num_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
        self._unchecked += num_bytes
        if texts and self._engine is not self._reference and self._unchecked >= _CHECKED_EVERY:
            self._check(texts[0], parts[0], place)
            self._unchecked = 0
        for i, ids in escaped.items():
            parts[i] = ids
        for number, ids in zip(numbers, parts, strict=True):
            if not len(ids):
                batch.problems.append(Problem("no_token", number, "the tokenizer makes no token of the text."))
        return *join([ids for ids in parts if len(ids)], self._dtype, self._specification.eod_id), num_bytes

    def _take_special(self, batch: Batch) -> dict[int, list[int]]:
        """Handle texts with special tokens: refuse them, or give the ids of the ones to escape, by position."""
        escaped, refused = {}, set()
        for i, text in enumerate(batch.texts):
            token = self._special.find(text)
            if token is None:
                continue
            if self._specification.special_in_text == "escape":
                escaped[i] = self._reference.encode_as_text(text)
                continue
            refused.add(i)
            message = (
                f"the text contains the special token {token}, which would end a document in the middle: use "
                "--special-in-text escape to encode it as text, or allow to keep it as the token."
            )
            batch.problems.append(Problem("special_token", batch.numbers[i], message))
        if refused:
            batch.texts[:] = [text for i, text in enumerate(batch.texts) if i not in refused]
            batch.numbers[:] = [number for i, number in enumerate(batch.numbers) if i not in refused]
        return escaped

    def _check(self, text: str, ids: Ids, place: str) -> None:
        """Compare the first text of a batch with the reference; a long one by its beginning, encoded apart."""
        part = text[:_CHECKED_CHARACTERS]
        found = ids if part == text else self._engine.encode([part])[0]
        if not self._special.find(part) and not np.array_equal(self._reference.encode([part])[0], found):
            raise InputError(
                f"gigatoken gives other ids than {self._reference.library} for the text that begins {text[:40]!r} in "
                f"{place}: use --engine reference, and report it to gigatoken."
            )


def join(parts: list[Ids], dtype: np.dtype, end: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Documents one after the other, of the dtype, and the tokens of each, int64.

    Args:
        end: id that is put after each; None for none.
    """
    lengths = np.fromiter(map(len, parts), np.int64, len(parts)) + (end is not None)
    joined = np.empty(lengths.sum(), dtype)
    begin = 0
    for part in parts:
        joined[begin : begin + len(part)] = part
        begin += len(part)
        if end is not None:
            joined[begin] = end
            begin += 1
    return joined, lengths


@functools.lru_cache(maxsize=1)
def _encoder(specification: Specification) -> _Encoder:
    return _Encoder(specification)


def _committed(prefix: Path) -> dict[str, Any] | None:
    """The record of a unit whose files are whole, by their checksums; a machine that fell may have lost a part."""
    try:
        record = json.loads(prefix.with_suffix(".json").read_bytes())
        start = 0
        for num_bytes, sha256 in record["files"]["bin"]["parts"]:
            if sha256_of(prefix.with_suffix(".bin"), start, num_bytes) != sha256:
                return None
            start += num_bytes
        whole = os.path.getsize(prefix.with_suffix(".bin")) == start
        same = sha256_of(prefix.with_suffix(".idx")) == record["files"]["idx"]["sha256"]
        return record if whole and same else None
    except (OSError, ValueError, KeyError):
        return None


def _rss_mb() -> float:
    """Peak memory of this process, in MB of 10^6 bytes."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # macOS, which counts in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    # Not getrusage, whose peak is also that of the process that started this one.
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024 / 1e6
