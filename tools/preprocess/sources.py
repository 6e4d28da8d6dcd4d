"""Input files: what patterns name, and the units of work that they are cut into.

A unit is a range of bytes of one file, and the records that start in it belong to it, so any process can read it alone.
"""

import glob
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

KINDS = {".jsonl": "jsonl", ".txt": "txt", ".parquet": "parquet", ".tar": "tar"}
COMPRESSIONS = {".gz": "gz", ".xz": "xz", ".zst": "zst"}
# Slow engines take half a second for the least, and a kill costs seconds of the fast one at most.
_MIN_UNIT_BYTES, _MAX_UNIT_BYTES = 1_000_000, 32_000_000
FORMATS = ".jsonl, .txt, .tar, each also .gz, .xz or .zst, and .parquet"


class ArgumentError(ValueError):
    """An argument of a command that cannot work; commands end with exit code 2."""


class InputError(ValueError):
    """Data that cannot be used; the message names the file and, where it can, the line. Exit code 1."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One input file.

    path: of a local file, or a URL that fsspec opens.
    kind: "jsonl", "txt", "parquet" or "tar".
    compression: "", "gz", "xz" or "zst".
    num_bytes: its size.
    version: text that changes when the file does: its time of modification, or what its store says instead.
    """

    path: str
    kind: str
    compression: str
    num_bytes: int
    version: str

    @property
    def name(self) -> str:
        """Its last part, for manifests, which hold no paths of one machine."""
        return self.path.rsplit("/", 1)[-1]

    def place(self, number: int) -> str:
        """Where record `number` stands, for messages; 0 is the file."""
        record = {"jsonl": "line", "parquet": "row", "tar": "sample"}.get(self.kind)
        return f"{self.path} {record} {number}" if number and record else self.path

    @property
    def is_divisible(self) -> bool:
        """Whether its records can be found from any position: lines, and row groups."""
        return self.kind == "parquet" or (self.kind == "jsonl" and not self.compression)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Bytes `start` to `end` of a source."""

    source: Source
    start: int
    end: int

    def describe(self) -> dict[str, Any]:
        """Its fields, for JSON."""
        return asdict(self)


def open_source(path: str) -> BinaryIO:
    """Open a local file or a URL for reading, at its start, without any shell."""
    if _is_url(path):
        import fsspec

        return fsspec.open(path, "rb").open()
    return open(path, "rb")


def find_sources(patterns: list[str]) -> list[Source]:
    """Files that the patterns name, sorted per pattern.

    Args:
        patterns: local paths or fsspec URLs, with `*`, `?`, `[...]` and `**`.

    Raises:
        ArgumentError: a pattern without files, a file twice or of an unknown format, a URL that nothing installed
            opens.
    """
    sources: list[Source] = []
    for pattern in patterns:
        found = _find_urls(pattern) if _is_url(pattern) else _find_local(pattern)
        if not found:
            raise ArgumentError(f"--input ({pattern}) names no file: quote a pattern and check the folder.")
        sources += found
    paths = [source.path for source in sources]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ArgumentError(f"--input names {twice} twice: name every file once.")
    return sources


def default_unit_bytes(sources: list[Source]) -> int:
    """A 64th of the input, so that many workers end together; the same for every shard and number of workers."""
    return min(max(sum(source.num_bytes for source in sources) // 64, _MIN_UNIT_BYTES), _MAX_UNIT_BYTES)


def plan_units(sources: list[Source], unit_bytes: int) -> list[Unit]:
    """Units in the order of the sources; a source that cannot be divided is one unit."""
    units = []
    for source in sources:
        step = unit_bytes if source.is_divisible else max(source.num_bytes, 1)
        starts = range(0, max(source.num_bytes, 1), step)
        units += [Unit(source=source, start=start, end=min(start + step, source.num_bytes)) for start in starts]
    return units


def units_of_shard(units: list[Unit], num_shards: int, shard_index: int) -> list[Unit]:
    """The part of shard `shard_index` of `num_shards`: neighbours, and about as many bytes as every other shard."""
    total, begin, mine = sum(unit.end - unit.start for unit in units), 0, []
    for unit in units:
        # An empty file at the end begins where the last shard ends.
        if min(begin * num_shards // max(total, 1), num_shards - 1) == shard_index:
            mine.append(unit)
        begin += unit.end - unit.start
    return mine


def count_lines_before(unit: Unit) -> int:
    """Lines of the file that start before the unit does; reads all of them."""
    count, remaining, last = 0, unit.start, b"\n"
    with open_source(unit.source.path) as file:
        while remaining and (block := file.read(min(2**22, remaining))):
            count, remaining, last = count + block.count(b"\n"), remaining - len(block), block[-1:]
    return count + (last != b"\n")


def _is_url(path: str) -> bool:
    return "://" in path


def _find_local(pattern: str) -> list[Source]:
    found = []
    for path in sorted(Path(name) for name in glob.glob(pattern, recursive=True)):
        if not path.is_file():
            raise ArgumentError(f"--input ({path}) must be a file: name files or a pattern such as '{path}/*.jsonl'.")
        facts = path.stat()
        found.append(_source(str(path), facts.st_size, str(facts.st_mtime_ns)))
    return found


def _find_urls(pattern: str) -> list[Source]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(pattern)
    except (ValueError, ImportError) as error:
        raise ArgumentError(f"--input ({pattern}) cannot be opened ({error}): install what its protocol needs.") from (
            error
        )
    names = sorted(system.glob(path)) if glob.has_magic(path) else [path] if system.isfile(path) else []
    facts = {name: system.info(name) for name in names}
    changing = ("mtime", "ETag", "etag", "LastModified", "last_modified", "created")
    return [
        _source(
            system.unstrip_protocol(name),
            fact["size"],
            next((str(fact[key]) for key in changing if fact.get(key)), ""),
        )
        for name, fact in facts.items()
        if fact["type"] == "file"
    ]


def _source(path: str, num_bytes: int, version: str) -> Source:
    plain, compression = path, ""
    for suffix, name in COMPRESSIONS.items():
        if path.endswith(suffix):
            plain, compression = path.removesuffix(suffix), name
    kind = next((name for suffix, name in KINDS.items() if plain.endswith(suffix)), None)
    if kind is None or (kind == "parquet" and compression):
        raise ArgumentError(f"--input ({path}) must be one of {FORMATS}.")
    return Source(path=path, kind=kind, compression=compression, num_bytes=num_bytes, version=version)
