"""Documents of text files, one raw record each, with the place where it stands."""

import codecs
import glob
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_OPENERS = {".gz": gzip.open, ".xz": lzma.open, "": open}
FORMATS = ".jsonl, .jsonl.gz, .jsonl.xz, .txt, .txt.gz, .txt.xz"


class ArgumentError(ValueError):
    """An argument of a command that cannot work; commands end with exit code 2."""


class InputError(ValueError):
    """Data that cannot be used; the message names the file and, where it can, the line. Exit code 1."""


class Record(NamedTuple):
    """A raw document.

    path: its file.
    line: line number from 1; 0 when the file as a whole is the document.
    data: a line of JSON, or the text itself.
    """

    path: str
    line: int
    data: bytes

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return f"{self.path} line {self.line}" if self.line else self.path


def find_files(patterns: list[str]) -> list[Path]:
    """Files that the patterns name, sorted per pattern.

    Raises:
        ArgumentError: a pattern without files, or a file of an unknown format.
    """
    files: list[Path] = []
    for pattern in patterns:
        found = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
        if not found:
            raise ArgumentError(f"--input ({pattern}) names no file: quote a pattern and check the folder.")
        files += found
    for path in files:
        if not path.is_file():
            raise ArgumentError(f"--input ({path}) must be a file: name files or a pattern such as '{path}/*.jsonl'.")
        _split_format(path)
    if len(set(files)) < len(files):
        twice = next(path for path in files if files.count(path) > 1)
        raise ArgumentError(f"--input names {twice} twice: name every file once.")
    return files


def read_records(path: Path) -> Iterator[Record]:
    """Records of one file: lines of JSON lines files, or the whole of a text file.

    Blank lines are left out, and so is a byte order mark. A file without anything gives one empty record, which
    `read_text` refuses.

    Raises:
        InputError: compressed data that is cut or broken, a file that cannot be read.
    """
    kind, opener = _split_format(path)
    number, empty = 0, True
    try:
        with opener(path, "rb") as file:
            if kind == ".txt":
                yield Record(str(path), 0, file.read().removeprefix(codecs.BOM_UTF8))
                return
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    empty = False
                    yield Record(str(path), number, line)
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        where = f" after line {number}" if number else ""
        raise InputError(f"{path}{where}: {error}: the file is cut or cannot be read, fetch it again.") from error
    if empty:
        yield Record(str(path), 0, b"")


def read_text(record: Record, text_key: str) -> str:
    """The text of a record.

    Args:
        record: from `read_records`.
        text_key: key of the text in JSON.

    Raises:
        InputError: no usable text.
    """
    where = record.place
    try:
        text = record.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}): convert it to UTF-8.") from error
    if record.line:
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON ({error}): every line must be one whole JSON object.") from error
        text = row.get(text_key) if isinstance(row, dict) else None
        if not isinstance(text, str):
            keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise InputError(f"{where}: no text under --text-key ({text_key}); the line has: {keys}.")
    if not text.strip():
        raise InputError(f"{where}: empty text.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: half a character (\\u{ord(text[error.start]):04x}), which no UTF-8 has.") from error
    return text


def _split_format(path: Path):
    compression = path.suffix if path.suffix in _OPENERS else ""
    kind = Path(path.stem).suffix if compression else path.suffix
    if kind not in (".jsonl", ".txt"):
        raise ArgumentError(f"--input ({path}) must be one of {FORMATS}.")
    return kind, _OPENERS[compression]
