"""Streams of bytes under the readers: decompressed, hashed, with their last bytes kept."""

import gzip
import lzma
import sys
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from megatron_gdn.optional import require

_DRAIN_BYTES = 2**22
# zstd can make thousands of bytes of one, so it is fed little at a time.
_ZSTD_BYTES = 2**16


def read_up_to(file: BinaryIO, num_bytes: int) -> bytes:
    """Read `num_bytes`, or all when there are fewer; one call of `read` may give less."""
    blocks = []
    while num_bytes and (block := file.read(num_bytes)):
        blocks.append(block)
        num_bytes -= len(block)
    return b"".join(blocks)


def broken_errors() -> tuple[type[Exception], ...]:
    """What the libraries raise for files that are cut or broken."""
    errors = [EOFError, lzma.LZMAError, zlib.error, OSError, tarfile.TarError]
    if "zstandard" in sys.modules:
        errors.append(sys.modules["zstandard"].ZstdError)
    if "pyarrow" in sys.modules:
        errors.append(sys.modules["pyarrow"].ArrowException)
    return tuple(errors)


@contextmanager
def decompressed(file: BinaryIO, compression: str) -> Iterator[BinaryIO]:
    """What a file holds; `compression` is "", "gz", "xz" or "zst"."""
    if compression == "gz":
        with gzip.GzipFile(fileobj=file) as plain:
            yield plain
    elif compression == "xz":
        with lzma.LZMAFile(file) as plain:
            yield plain
    elif compression == "zst":
        yield _ZstdFile(file)
    else:
        yield file


class HashedFile:
    """Reads a file from start to end and hashes it."""

    def __init__(self, file: BinaryIO, digest):
        self._file, self._digest = file, digest

    def read(self, num_bytes: int = -1) -> bytes:
        block = self._file.read(num_bytes)
        self._digest.update(block)
        return block

    def drain(self) -> None:
        """Hash the rest, which a decompressor leaves when the stream in it ends."""
        while self.read(_DRAIN_BYTES):
            pass

    def seekable(self) -> bool:
        return False

    def readable(self) -> bool:
        return True

    closed = False


class _ZstdFile:
    """Frames of zstd one after the other; zstandard's own stream reader takes a cut frame for a whole one."""

    def __init__(self, file: BinaryIO):
        self._file, self._frame, self._ahead = file, None, b""
        zstandard = require("zstandard", extra="preprocess", purpose="zst input")
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)

    def read(self, num_bytes: int) -> bytes:
        while True:
            if self._ahead:
                block, self._ahead = self._ahead[:num_bytes], self._ahead[num_bytes:]
                return block
            data = self._file.read(_ZSTD_BYTES)
            if not data:
                if self._frame is not None:
                    raise EOFError("a zstd frame ends too early")
                return b""
            parts = []
            while data:
                self._frame = self._frame or self._decompressor.decompressobj()
                parts.append(self._frame.decompress(data))
                data = self._frame.unused_data if self._frame.eof else b""
                if self._frame.eof:
                    self._frame = None
            self._ahead = b"".join(parts)


class Tail:
    """Reads a stream and keeps its last two blocks of a tar file."""

    def __init__(self, file: BinaryIO):
        self._file, self.last = file, b""

    def read(self, num_bytes: int) -> bytes:
        block = self._file.read(num_bytes)
        self.last = (self.last + block)[-2 * tarfile.BLOCKSIZE :] if len(block) < 1024 else block[-1024:]
        return block
