"""A file, or a part of one, as a stream of bytes: plain or compressed, chosen by its last suffix."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import stat
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from llm_trainer.errors import DataError

COMPRESSIONS = (".gz", ".bz2", ".zst")
MAX_RECORD_BYTES = (
    64 * 2**20
)  # bytes of a line or record; what is longer is set aside, since one is held at a time
BLOCK_BYTES = 2**20
READ_ERRORS = (OSError, EOFError, zlib.error)  # what a damaged or missing file raises while it is read


@dataclass(frozen=True, slots=True)
class FileRange:
    """A file, or the part of it that begins in [start, stop): bytes of a file of lines, row groups or batches
    of a table.

    `name` is what messages call the file: relative to what the user gave.
    """

    path: Path
    name: str
    start: int = 0
    stop: int | None = None

    def open_raw(self) -> io.BufferedReader:
        """The whole file's bytes as they are stored. Raises OSError, also for a pipe, which would be waited
        for without end.
        """
        if not stat.S_ISREG(self.path.stat().st_mode):
            raise OSError("not a regular file")
        return self.path.open("rb")

    def open(self) -> io.BufferedReader:
        """The whole file's bytes, decompressed. Raises one of `READ_ERRORS`, now or while it is read."""
        return open_decompressed(self.open_raw(), compression_suffix(self.path), self.name)


def open_decompressed(stored: io.BufferedReader, compression: str | None, name: str) -> io.BufferedReader:
    """A compressed file's contents; `name` is what an error calls it. Closing closes `stored` too."""
    if compression == ".gz":
        return _Stream(gzip.GzipFile(fileobj=stored, mode="rb"), stored)
    if compression == ".bz2":
        return _Stream(bz2.BZ2File(stored), stored)
    if compression == ".xz":
        return _Stream(lzma.LZMAFile(stored), stored, lzma.LZMAError)
    return _open_zstd(stored, name) if compression == ".zst" else stored


def compression_suffix(path: Path) -> str | None:
    """The suffix that says how a file is compressed, or None."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSIONS else None


def line_range(opened: IO[bytes], extent: FileRange) -> tuple[int, int | None]:
    """(first byte, byte after the last, None for the end) of the lines that begin in the extent of a plain
    file.

    Every line belongs to exactly one of several extents side by side, and no scan goes past a line that began
    in the extent.
    """
    begin = _next_line(opened, extent.start, extent.stop)
    if extent.stop is None:
        return begin, None
    return (begin, begin) if begin >= extent.stop else (begin, _next_line(opened, extent.stop, None))


def _next_line(opened: IO[bytes], offset: int, stop: int | None) -> int:
    """Where the first line begins at or after `offset`; looked for up to `stop`."""
    if offset == 0:
        return 0
    place = opened.seek(offset - 1)
    while block := opened.readline(BLOCK_BYTES):
        place += len(block)
        if block.endswith(b"\n") or (stop is not None and place >= stop):
            break
    return max(place, offset)


def read_lines(extent: FileRange, *, keep_line_ends: bool = False) -> Iterator[tuple[str, int, bytes | None]]:
    """(where, byte offset, line) of each line that begins in the extent; None for one longer than
    LONGEST_RECORD.

    The line comes without its end unless `keep_line_ends`, and without a byte order mark. `where` is a line
    number in a file read from its start, else the byte at which the line begins.
    """
    with extent.open() as opened:
        offset, number = 0, 0
        end: int | None = None
        if extent.start or extent.stop is not None:
            offset, end = line_range(opened, extent)
            opened.seek(offset)
        while end is None or offset < end:
            line = opened.readline(MAX_RECORD_BYTES + 1)
            if not line:
                return
            start, number = offset, number + 1
            offset += len(line)
            where = (
                f"{extent.name}, line {number}"
                if extent.start == 0
                else f"{extent.name}, the line at byte {start}"
            )
            if len(line) > MAX_RECORD_BYTES and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = opened.readline(BLOCK_BYTES)
                    offset += len(line)
                yield where, start, None
                continue
            line = line if keep_line_ends else line.removesuffix(b"\n").removesuffix(b"\r")
            skipped = len(codecs.BOM_UTF8) if start == 0 and line.startswith(codecs.BOM_UTF8) else 0
            yield where, start + skipped, line[skipped:]


def _open_zstd(stored: io.BufferedReader, name: str) -> io.BufferedReader:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        stored.close()
        raise DataError(
            f"reading {name} needs the extra 'formats': pip install 'llm-trainer[formats]'"
        ) from None
    return _Stream(zstd.ZstdFile(stored), stored, zstd.ZstdError)


class _Stream(io.BufferedReader):
    """Decompressed bytes. Closing closes the file below too; an error of the library's own kind becomes an
    OSError.
    """

    def __init__(
        self, raw: io.BufferedIOBase, stored: io.BufferedReader, error: type[Exception] = OSError
    ) -> None:
        super().__init__(_Translated(raw, error), BLOCK_BYTES)
        self._stored = stored

    def close(self) -> None:
        super().close()
        self._stored.close()


class _Translated(io.RawIOBase):
    def __init__(self, raw: io.BufferedIOBase, error: type[Exception]) -> None:
        self._raw, self._error = raw, error

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            return self._raw.readinto(buffer)
        except self._error as error:
            raise OSError(str(error)) from None

    def close(self) -> None:
        self._raw.close()
        super().close()
