"""Documents from files: of several kinds, each plain or compressed, one file or a folder of them, read in a
fixed order with flat memory.

Small files share a unit, a large one of lines is cut into ranges of bytes, so that any number of workers can
share either. A compressed file cannot be entered midway: it is one unit, however large.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_trainer.data.sources import base as documents
from llm_trainer.data.sources import file_io as storage
from llm_trainer.data.sources.base import Partition, Rejected, SourceItem
from llm_trainer.data.sources.csv_files import read_csv_column
from llm_trainer.data.sources.file_io import COMPRESSIONS, FileRange, compression_suffix
from llm_trainer.data.sources.json_files import read_json_column, read_json_lines_column
from llm_trainer.data.sources.parquet_arrow import (
    hash_arrow,
    hash_parquet,
    read_arrow_column,
    read_parquet_column,
    split_arrow,
    split_parquet,
)
from llm_trainer.data.sources.text_files import read_text_file, read_text_lines
from llm_trainer.errors import DataError

LINE_SUFFIXES = (".txt", ".text")  # each line may be a document
TEXT_SUFFIXES = (*LINE_SUFFIXES, ".md", ".markdown", ".rst", ".py")
TABLE_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}  # compressed within
KIND_BY_SUFFIX = {
    **dict.fromkeys(TEXT_SUFFIXES, "text"),
    **{".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv"},
    **TABLE_SUFFIXES,
}
PARTITION_BYTES = 32 * 2**20
MAX_FILES_PER_PARTITION = 2000
READER_VERSION = 1  # part of every hash: raise it when the same bytes would be read as other documents
_OF_LINES = ("lines", "jsonl")
_READERS: dict[str, Callable[[FileRange], Iterator[SourceItem]]] = {
    "text": read_text_file,
    "lines": read_text_lines,
}
_COLUMN_READERS: dict[str, Callable[[FileRange, str], Iterator[SourceItem]]] = {
    "jsonl": read_json_lines_column,
    "json": read_json_column,
    "csv": read_csv_column,
    "parquet": read_parquet_column,
    "arrow": read_arrow_column,
}
_PARTS = {"parquet": split_parquet, "arrow": split_arrow}
_HASHES = {"parquet": hash_parquet, "arrow": hash_arrow}


@dataclass(frozen=True, slots=True)
class FileSlice:
    """A file by its name relative to the root, or the part of it that begins in [start, stop), and how it is
    read.
    """

    name: str
    kind: str
    size: int
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class FilePartition:
    """Some small files, or a part of a large one."""

    root: Path
    parts: tuple[FileSlice, ...]
    text_column: str

    @property
    def name(self) -> str:
        """The file and which part of it, or the first file and how many follow."""
        first = self.parts[0]
        if len(self.parts) > 1:
            return f"{first.name} and {len(self.parts) - 1} more"
        return first.name if first.start == 0 and first.stop is None else f"{first.name}, from {first.start}"

    @property
    def size(self) -> int:
        """Bytes of the files or parts, as they are stored."""
        return sum(part.size for part in self.parts)

    def content_hash(self) -> str:
        """sha256 over how each file is read and the bytes that are read of it."""
        digest = hashlib.sha256(f"{READER_VERSION}".encode())
        for part in self.parts:
            column = self.text_column if part.kind in _COLUMN_READERS else ""
            digest.update(f"\0{part.kind}\0{compression_suffix(Path(part.name))}\0{column}\0".encode())
            try:
                digest.update(self._hash_of_part(part))
            except OSError:
                digest.update(b"unreadable")  # as reading will say; once it can be read, the hash is another
        return digest.hexdigest()

    def read_chunks(self) -> Iterator[SourceItem]:
        """Every document of every file; a file that is damaged is rejected from there on."""
        for part in self.parts:
            try:
                yield from self._read(part)
            except storage.READ_ERRORS as error:
                yield Rejected("unreadable file", f"{part.name}: {error}")

    def _extent(self, part: FileSlice) -> FileRange:
        return FileRange(self.root / part.name, part.name, part.start, part.stop)

    def _read(self, part: FileSlice) -> Iterator[SourceItem]:
        if part.kind in _READERS:
            return _READERS[part.kind](self._extent(part))
        return _COLUMN_READERS[part.kind](self._extent(part), self.text_column)

    def _hash_of_part(self, part: FileSlice) -> bytes:
        """sha256 of the stored bytes that a part's documents are read from."""
        extent = self._extent(part)
        if part.stop is None:
            with extent.open_raw() as opened:
                return hashlib.file_digest(opened, "sha256").digest()
        return (
            _HASHES[part.kind](extent, self.text_column) if part.kind in _HASHES else _hash_of_lines(extent)
        )


@dataclass(frozen=True)
class FileSource:
    """A file, or every file of a known kind in a folder (by relative path, hidden ones and `excluded` left
    out).

    With `one_document_per_line`, each line of a .txt file is a document.
    """

    path: Path
    text_column: str = "text"
    one_document_per_line: bool = False
    excluded: Path | None = None
    partition_bytes: int = PARTITION_BYTES

    @property
    def name(self) -> str:
        """The file's or folder's own name."""
        return self.path.resolve().name

    def files(self) -> list[Path]:
        """The files to read; raises DataError where the path is missing or holds none of a known kind."""
        if self.path.is_file():
            return [self.path]
        if not self.path.is_dir():
            raise DataError(f"the input {self.path} does not exist; give a text file or a folder of them")
        found, other = [], set()
        for folder, folders, names in os.walk(self.path):
            place = Path(folder)
            folders[:] = sorted(
                name for name in folders if not name.startswith(".") and not self._is_excluded(place / name)
            )
            for name in names:
                if name.startswith("."):
                    continue
                file = place / name
                if _kind(file) is None:
                    other.add("".join(file.suffixes) or name)
                else:
                    found.append(file)
        if not found:
            seen = f" (it holds {', '.join(sorted(other)[:8])})" if other else ""
            raise DataError(
                f"no text in the folder {self.path}{seen}; files of these kinds are read: {', '.join(KIND_BY_SUFFIX)}, each also with .gz"
            )
        return sorted(found, key=lambda file: file.relative_to(self.path).as_posix())

    def partitions(self) -> Sequence[Partition]:
        """Files in the order of their paths: neighbours of less than `partition_bytes` together, larger ones alone
        or in parts.
        """
        root = self.path.parent if self.path.is_file() else self.path
        units: list[Partition] = []
        group: list[FileSlice] = []
        held = 0
        for file in self.files():
            parts = self._parts(file, file.relative_to(root).as_posix())
            size = sum(part.size for part in parts)
            if group and (held + size > self.partition_bytes or len(group) == MAX_FILES_PER_PARTITION):
                units.append(FilePartition(root, tuple(group), self.text_column))
                group, held = [], 0
            if len(parts) == 1:
                group.append(parts[0])
                held += size
            else:
                units += [FilePartition(root, (part,), self.text_column) for part in parts]
        return [*units, FilePartition(root, tuple(group), self.text_column)] if group else units

    def read_chunks(self) -> Iterator[SourceItem]:
        """Every document of every file."""
        return documents.read_all(self.partitions())

    def content_hash(self) -> str:
        """sha256 over how each file is read and what it holds, in reading order."""
        return documents.combined_hash(self.partitions())

    def size(self) -> int | None:
        """Bytes of all files, None with compressed ones among them."""
        files = self.files()
        return None if any(compression_suffix(file) for file in files) else sum(_size(file) for file in files)

    def _parts(self, file: Path, name: str) -> list[FileSlice]:
        kind, size = _kind(file) or "text", _size(file)
        if (
            kind == "text"
            and self.one_document_per_line
            and _suffix(file) not in set(TEXT_SUFFIXES) - set(LINE_SUFFIXES)
        ):
            kind = "lines"
        if size > self.partition_bytes and kind in _PARTS:
            cut = _PARTS[kind](FileRange(file, name), size, self.partition_bytes)
            if len(cut) > 1:
                return [FileSlice(name, kind, share, start, stop) for start, stop, share in cut]
        if size > self.partition_bytes and kind in _OF_LINES and not compression_suffix(file):
            starts = range(0, size, self.partition_bytes)
            return [
                FileSlice(
                    name,
                    kind,
                    min(size, start + self.partition_bytes) - start,
                    start,
                    start + self.partition_bytes,
                )
                for start in starts
            ]
        return [FileSlice(name, kind, size)]

    def _is_excluded(self, folder: Path) -> bool:
        return self.excluded is not None and folder.resolve() == self.excluded.resolve()


def supported_suffixes() -> str:
    """The suffixes that are read, in words."""
    plain = [suffix for suffix in KIND_BY_SUFFIX if suffix not in TABLE_SUFFIXES]
    return f"{', '.join(plain)} (each also with {', '.join(COMPRESSIONS)}), {', '.join(TABLE_SUFFIXES)}"


def _suffix(file: Path) -> str:
    """The suffix that says what a file holds, without that of its compression."""
    return (Path(file.stem) if compression_suffix(file) else file).suffix.lower()


def _kind(file: Path) -> str | None:
    kind = KIND_BY_SUFFIX.get(_suffix(file))
    return None if kind in TABLE_SUFFIXES.values() and compression_suffix(file) else kind


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0  # a link to nowhere: reading it will say so


def _hash_of_lines(extent: FileRange) -> bytes:
    """sha256 of the lines that begin in the extent."""
    with extent.open_raw() as opened:
        offset, end = storage.line_range(opened, extent)
        digest = hashlib.sha256()
        opened.seek(offset)
        while block := opened.read(
            storage.BLOCK_BYTES if end is None else min(storage.BLOCK_BYTES, end - offset)
        ):
            offset += len(block)
            digest.update(block)
        return digest.digest()
