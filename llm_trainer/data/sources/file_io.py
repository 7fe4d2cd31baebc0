"""A file, or a byte range of one, as a stream of bytes; its last suffix names its compression, if any."""

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

from llm_trainer.data.optional_deps import missing_extra
from llm_trainer.errors import DataError

COMPRESSIONS = (".gz", ".bz2", ".zst")
MAX_RECORD_BYTES = 64 * 2**20
"""Bytes of a line or record; a longer one is rejected, because one record is in memory at a time."""
BLOCK_BYTES = 2**20
READ_ERRORS = (OSError, EOFError, zlib.error)
"""What reading a damaged or missing file raises."""


@dataclass(frozen=True, slots=True)
class FileRange:
    """A file, or the part of it that begins in [start, stop).

    Attributes:
        path: The file.
        name: The name used in messages, relative to what the user gave.
        start: The first byte of a file of lines, row group of a parquet file, or batch of an arrow file.
        stop: The end of the range in the same unit; None is the end of the file.
    """

    path: Path
    name: str
    start: int = 0
    stop: int | None = None

    def open_raw(self) -> io.BufferedReader:
        """Open the entire file without decompressing it.

        Raises:
            OSError: The file cannot be opened, or is a pipe, which might block forever.
        """
        if not stat.S_ISREG(self.path.stat().st_mode):
            raise OSError("not a regular file")
        return self.path.open("rb")

    def open(self) -> io.BufferedReader:
        """Open the entire file, decompressed. One of `READ_ERRORS` is raised now or while it is read."""
        return open_decompressed(self.open_raw(), compression_suffix(self.path), self.name)


def open_decompressed(raw: io.BufferedReader, compression: str | None, name: str) -> io.BufferedReader:
    """Return the decompressed contents of an open file.

    Args:
        raw: The compressed bytes; closing the result closes this too.
        compression: The suffix of the compression, for instance ".gz"; None for a plain file.
        name: The file's name in error messages.

    Raises:
        DataError: The file is compressed with zstd, and the package for that is not installed.
    """
    if compression == ".gz":
        return _DecompressedReader(gzip.GzipFile(fileobj=raw, mode="rb"), raw)
    if compression == ".bz2":
        return _DecompressedReader(bz2.BZ2File(raw), raw)
    if compression == ".xz":
        return _DecompressedReader(lzma.LZMAFile(raw), raw, lzma.LZMAError)
    return _open_zstd(raw, name) if compression == ".zst" else raw


def compression_suffix(path: Path) -> str | None:
    """Return the suffix that names a file's compression, or None for a plain file."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSIONS else None


def format_suffix(path: Path) -> str:
    """Return the suffix that names a file's format, without the suffix of its compression."""
    return (Path(path.stem) if compression_suffix(path) else path).suffix.lower()


def line_range(opened: IO[bytes], file_range: FileRange) -> tuple[int, int | None]:
    """Find the lines that begin in a range of a plain file.

    Every line belongs to exactly one of several adjacent ranges, and no scan goes past a line that began in
    the range.

    Args:
        opened: The open file.
        file_range: The byte range.

    Returns:
        The first byte of those lines and the byte after the last one, which is None at the end of the file.
    """
    begin = _next_line_start(opened, file_range.start, file_range.stop)
    if file_range.stop is None:
        return begin, None
    return (
        (begin, begin)
        if begin >= file_range.stop
        else (begin, _next_line_start(opened, file_range.stop, None))
    )


def _next_line_start(opened: IO[bytes], offset: int, stop: int | None) -> int:
    """The start of the first line at or after `offset`; the search ends at `stop`."""
    if offset == 0:
        return 0
    position = opened.seek(offset - 1)
    while block := opened.readline(BLOCK_BYTES):
        position += len(block)
        if block.endswith(b"\n") or (stop is not None and position >= stop):
            break
    return max(position, offset)


def read_lines(
    file_range: FileRange, *, keep_line_ends: bool = False
) -> Iterator[tuple[str, int, bytes | None]]:
    """Yield each line that begins in the range, without a byte order mark.

    Args:
        file_range: The file, or a byte range of it.
        keep_line_ends: Whether lines come with their line ends.

    Yields:
        The line's position for messages (a line number in a file read from its start, else a byte offset),
        its byte offset, and its bytes, which are None if they are more than MAX_RECORD_BYTES.
    """
    with file_range.open() as opened:
        offset, number = 0, 0
        end: int | None = None
        if file_range.start or file_range.stop is not None:
            offset, end = line_range(opened, file_range)
            opened.seek(offset)
        while end is None or offset < end:
            line = opened.readline(MAX_RECORD_BYTES + 1)
            if not line:
                return
            start, number = offset, number + 1
            offset += len(line)
            where = (
                f"{file_range.name}, line {number}"
                if file_range.start == 0
                else f"{file_range.name}, the line at byte {start}"
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


def _open_zstd(raw: io.BufferedReader, name: str) -> io.BufferedReader:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raw.close()
        raise DataError(missing_extra(f"reading {name}", "formats")) from None
    return _DecompressedReader(zstd.ZstdFile(raw), raw, zstd.ZstdError)


class _DecompressedReader(io.BufferedReader):
    """Decompressed bytes. Closing it closes the file below too; the library's own errors become OSError."""

    def __init__(
        self, decompressor: io.BufferedIOBase, raw: io.BufferedReader, error: type[Exception] = OSError
    ) -> None:
        super().__init__(_ErrorTranslator(decompressor, error), BLOCK_BYTES)
        self._compressed = raw

    def close(self) -> None:
        super().close()
        self._compressed.close()


class _ErrorTranslator(io.RawIOBase):
    def __init__(self, decompressor: io.BufferedIOBase, error: type[Exception]) -> None:
        self._decompressor, self._error = decompressor, error

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            return self._decompressor.readinto(buffer)
        except self._error as error:
            raise OSError(str(error)) from None

    def close(self) -> None:
        self._decompressor.close()
        super().close()
