"""Texts of the records of a unit, in batches of a few MB whatever the size of the file."""

import codecs
import hashlib
import json
import re
import tarfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

from megatron_gdn.optional import require
from tools.preprocess.sources import Unit, open_source
from tools.preprocess.streams import HashedFile, Tail, broken_errors, decompressed, read_up_to

_BATCH_BYTES = 2**22
# Name of a member: the sample it belongs to, then the field; and members that are not data. webdataset 1.0.2,
# tariterators.base_plus_ext and tar_file_iterator.
_MEMBER_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_NOT_DATA = re.compile(r"__[^/]*__($|/)")


class DamagedError(Exception):
    """A file that is cut or broken; nothing of it is used."""


class Problem(NamedTuple):
    """Why a record gives no document.

    kind: short name, for counting.
    number: of the record in its unit, from 1; of the row in a parquet file; 0 when the file is the record.
    message: what is wrong and the remedy.
    """

    kind: str
    number: int
    message: str


@dataclass(kw_only=True)
class Batch:
    """Some records: their texts, with their numbers, and problems of others among them."""

    texts: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def divide(self, num_characters: int) -> Iterator["Batch"]:
        """The same records in parts of about so many characters; a problem is with the records around it."""
        ends, room = [], num_characters
        for i, text in enumerate(self.texts):
            room -= len(text)
            if room <= 0:
                ends.append(i + 1)
                room = num_characters
        begin, problems = 0, deque(sorted(self.problems, key=lambda problem: problem.number))
        for end in ends:
            part = Batch(texts=self.texts[begin:end], numbers=self.numbers[begin:end])
            while problems and problems[0].number < part.numbers[-1]:
                part.problems.append(problems.popleft())
            yield part
            begin = end
        yield Batch(texts=self.texts[begin:], numbers=self.numbers[begin:], problems=list(problems))


class UnitReader:
    """Iterates over the batches of one unit.

    Args:
        unit: to read.
        text_key: key of the text in JSON lines, column in parquet.
        tar_field: extension of the members with the text in tar shards; "json" for objects with `text_key`.
        max_document_bytes: longer lines and texts are problems.

    After the last batch:
        num_records: lines, rows or samples; with the earlier units of a file, what makes numbers of lines absolute.
        sha256: of the bytes `unit.start` to `unit.end`.

    Raises while iterating:
        DamagedError: a file that is cut, or broken in another way.
    """

    def __init__(self, unit: Unit, *, text_key: str, tar_field: str, max_document_bytes: int):
        self.unit, self._key, self._tar_field, self._limit = unit, text_key, tar_field, max_document_bytes
        self._digest = hashlib.sha256()
        self.num_records = 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[Batch]:
        source, seen = self.unit.source, False
        read = {"jsonl": self._read_jsonl, "txt": self._read_txt, "parquet": self._read_parquet, "tar": self._read_tar}
        try:
            for batch in read[source.kind]():
                seen = seen or bool(batch.numbers or batch.problems)
                yield batch
        except broken_errors() as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the disk or the network, not of the file
            where = f" after record {self.num_records}" if self.num_records else ""
            raise DamagedError(f"{where}: {error or 'it ends too early'}") from error
        if not seen and self.unit.start == 0 and self.unit.end == source.num_bytes:
            yield Batch(problems=[Problem("empty_file", 0, "no record: remove the file.")])

    def _read_jsonl(self) -> Iterator[Batch]:
        with open_source(self.unit.source.path) as file:
            if self.unit.source.compression:
                hashed = HashedFile(file, self._digest)
                with decompressed(hashed, self.unit.source.compression) as plain:
                    yield from self._parse_lines(iter(lambda: read_up_to(plain, _BATCH_BYTES), b""), False)
                hashed.drain()
                return
            inside_line = False
            if self.unit.start:
                file.seek(self.unit.start - 1)
                inside_line = file.read(1) != b"\n"
            yield from self._parse_lines(self._range(file), inside_line)

    def _range(self, file: BinaryIO) -> Iterator[bytes]:
        """The bytes of the unit, and the rest of the line that its end cuts."""
        remaining, last = self.unit.end - self.unit.start, b"\n"
        while remaining:
            block = file.read(min(_BATCH_BYTES, remaining))
            if not block:
                raise DamagedError(": it became shorter while it was read")
            self._digest.update(block)
            remaining, last = remaining - len(block), block[-1:]
            yield block
        while last != b"\n" and (block := file.read(2**16)):
            end = block.find(b"\n") + 1
            yield block[:end] if end else block
            last = b"\n" if end else b""

    def _parse_lines(self, blocks: Iterator[bytes], inside_line: bool) -> Iterator[Batch]:
        rest, dropping, first = b"", inside_line, self.unit.start == 0
        for block in blocks:
            if first:
                block, first = block.removeprefix(codecs.BOM_UTF8), False
            if dropping:
                end = block.find(b"\n")
                if end < 0:
                    continue
                block, dropping = block[end + 1 :], False
            lines = block.split(b"\n")
            lines[0] = rest + lines[0]
            rest = lines.pop()
            batch = self._parse(lines)
            if len(rest) > self._limit:
                self.num_records += 1
                batch.problems.append(self._too_long("line", self.num_records))
                rest, dropping = b"", True
            yield batch
        if rest:
            yield self._parse([rest])

    def _parse(self, lines: list[bytes]) -> Batch:
        orjson = require("orjson", extra="preprocess", purpose="reading JSON lines")
        batch, number, key, limit = Batch(), self.num_records, self._key, self._limit
        texts, numbers, loads = batch.texts, batch.numbers, orjson.loads
        self.num_records += len(lines)
        for line in lines:
            number += 1
            if len(line) > limit:
                batch.problems.append(self._too_long("line", number))
                continue
            try:
                row = loads(line)
            except orjson.JSONDecodeError:
                if line.isspace() or not line:
                    continue
                row = _parse_slowly(line)
                if isinstance(row, str):
                    kind, _, message = row.partition(":")
                    batch.problems.append(Problem(kind, number, message))
                    continue
            text = row.get(key) if type(row) is dict else None
            if type(text) is str and text and not text.isspace():
                texts.append(text)
                numbers.append(number)
            else:
                batch.problems.append(self._unusable(row, text, number))
        return batch

    def _unusable(self, row, text, number: int) -> Problem:
        if isinstance(text, str):
            return Problem("empty", number, "empty text.")
        keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        return Problem("wrong_key", number, f"no text under --text-key ({self._key}); the record has: {keys}.")

    def _too_long(self, what: str, number: int) -> Problem:
        limit = f"--max-document-mb ({self._limit / 1e6:g})"
        return Problem("too_long", number, f"a {what} longer than {limit}: cut it into documents, or raise the limit.")

    def _add(self, batch: Batch, data: bytes, number: int) -> None:
        """Take the bytes of a text into a batch."""
        if len(data) > self._limit:
            batch.problems.append(self._too_long("text", number))
            return
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            batch.problems.append(Problem("not_utf8", number, _not_utf8(error)))
            return
        if text and not text.isspace():
            batch.texts.append(text)
            batch.numbers.append(number)
        else:
            batch.problems.append(Problem("empty", number, "empty text."))

    def _read_txt(self) -> Iterator[Batch]:
        batch = Batch()
        with open_source(self.unit.source.path) as file:
            hashed = HashedFile(file, self._digest)
            with decompressed(hashed, self.unit.source.compression) as plain:
                data = read_up_to(plain, self._limit + 1)
                while plain.read(_BATCH_BYTES):
                    pass
            hashed.drain()
        if data:
            self._add(batch, data.removeprefix(codecs.BOM_UTF8), 0)
        yield batch

    def _read_parquet(self) -> Iterator[Batch]:
        parquet = require("pyarrow.parquet", extra="preprocess", purpose="parquet input")
        with open_source(self.unit.source.path) as file:
            file.seek(self.unit.start)
            remaining = self.unit.end - self.unit.start
            while remaining and (block := file.read(min(_BATCH_BYTES, remaining))):
                self._digest.update(block)
                remaining -= len(block)
            if not self.unit.source.num_bytes:
                return
            table = parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20)
            names = table.schema_arrow.names
            if self._key not in names:
                message = f"no column of --text-key ({self._key}); the file has: {', '.join(names)}."
                if self.unit.start == 0:
                    yield Batch(problems=[Problem("wrong_key", 0, message)])
                return
            row = 0
            for group in range(table.num_row_groups):
                facts = table.metadata.row_group(group)
                if self.unit.start <= _first_byte(facts) < self.unit.end:
                    yield from self._read_row_group(table, group, row)
                row += facts.num_rows

    def _read_row_group(self, table, group: int, row: int) -> Iterator[Batch]:
        facts = table.metadata.row_group(group)
        rows = max(1, _BATCH_BYTES * facts.num_rows // max(1, facts.total_byte_size))
        for part in table.iter_batches(batch_size=rows, row_groups=[group], columns=[self._key]):
            batch = Batch()
            for value in part.column(0).to_pylist():
                row += 1
                self.num_records += 1
                if isinstance(value, str):
                    self._add(batch, value.encode("utf-8", "surrogatepass"), row)
                elif isinstance(value, bytes):
                    self._add(batch, value, row)
                else:
                    batch.problems.append(self._unusable({self._key: value}, None, row))
            yield batch

    def _read_tar(self) -> Iterator[Batch]:
        with open_source(self.unit.source.path) as file:
            hashed = HashedFile(file, self._digest)
            with decompressed(hashed, self.unit.source.compression) as plain:
                tail = Tail(plain)
                with tarfile.open(fileobj=tail, mode="r|") as archive:
                    yield from self._batches_of_samples(archive)
                while tail.read(_BATCH_BYTES):
                    pass
                # tarfile takes the end of the file for the end of the archive, which two blocks of zeros mark.
                if tail.last.strip(b"\0") or len(tail.last) < 2 * tarfile.BLOCKSIZE:
                    raise DamagedError(f" after record {self.num_records}: it ends without the mark of its end")
            hashed.drain()

    def _batches_of_samples(self, archive: tarfile.TarFile) -> Iterator[Batch]:
        batch, num_bytes = Batch(), 0
        for key, fields in _samples(archive, self._tar_field, self._limit):
            self.num_records += 1
            data = fields.get(self._tar_field)
            if self._tar_field not in fields:
                names = ", ".join(fields) or "none"
                message = f"sample {key} has no field of --tar-field ({self._tar_field}); it has: {names}."
                batch.problems.append(Problem("wrong_key", self.num_records, message))
            elif data is None:
                batch.problems.append(self._too_long("text", self.num_records))
            elif self._tar_field == "json":
                self.num_records -= 1  # counted by _parse, as a line
                part = self._parse([data.replace(b"\n", b" ")])
                batch.texts += part.texts
                batch.numbers += part.numbers
                batch.problems += part.problems
            else:
                self._add(batch, data, self.num_records)
            num_bytes += len(data or b"")
            if num_bytes > _BATCH_BYTES:
                yield batch
                batch, num_bytes = Batch(), 0
        yield batch


def _samples(archive: tarfile.TarFile, wanted: str, limit: int) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """Key and fields of each sample, by the rules of the webdataset package: neighbours with the same key.

    Only the wanted field is read, and it is None when it is longer than `limit`.
    """
    key, fields = None, {}
    for member in archive:
        archive.members = []  # tarfile would keep them all
        name = member.name
        matched = _MEMBER_NAME.match(name)
        if not member.isreg() or matched is None or _NOT_DATA.match(name):
            continue
        prefix, suffix = matched.group(1), matched.group(2).lower()
        if prefix != key:
            if key is not None:
                yield key, fields
            key, fields = prefix, {}
        if suffix in fields:
            raise DamagedError(f": member {name} is there twice in a sample")
        fields[suffix] = None
        if suffix == wanted and member.size <= limit:
            fields[suffix] = archive.extractfile(member).read()
    if key is not None:
        yield key, fields


def _parse_slowly(line: bytes):
    """A row that orjson refuses and Python's json takes (NaN), or text "kind: message"."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"not_utf8:{_not_utf8(error)}"
    try:
        row = json.loads(text)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"not_utf8:half a character (\\u{ord(error.object[error.start]):04x}), which no UTF-8 has."
    except (ValueError, RecursionError) as error:
        return f"malformed:not JSON ({error}): every line must be one whole JSON object."
    return row if isinstance(row, dict) else {}


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 ({error.reason} at byte {error.start}): convert it to UTF-8."


def _first_byte(row_group) -> int:
    column = row_group.column(0)
    start = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset:
        start = min(start, column.dictionary_page_offset)
    return start
