"""Documents from files of several formats, each plain or compressed: one file, or a folder of them.

Files are read in a fixed order with constant memory. Neighbouring small files form one partition, and a large
file of lines or of a table is divided into several, so that any number of workers can read either in
parallel. A compressed file cannot be read from the middle: it is one partition, however large.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_trainer.data.sources import base, file_io
from llm_trainer.data.sources.base import Partition, Rejected, SourceItem
from llm_trainer.data.sources.csv_files import read_csv_column
from llm_trainer.data.sources.file_io import COMPRESSIONS, FileRange, compression_suffix, format_suffix
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

LINE_SUFFIXES = (".txt", ".text")
"""Formats of which each line may be a document."""
TEXT_SUFFIXES = (*LINE_SUFFIXES, ".md", ".markdown", ".rst", ".py")
TABLE_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}
"""Formats that compress their own contents, and so are not read from a compressed file."""
KIND_BY_SUFFIX = {
    **dict.fromkeys(TEXT_SUFFIXES, "text"),
    **{".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv"},
    **TABLE_SUFFIXES,
}
PARTITION_BYTES = 32 * 2**20
MAX_FILES_PER_PARTITION = 2000
READER_VERSION = 1
"""Part of every hash; it must grow when the same bytes would be read as other documents."""
_LINE_KINDS = ("lines", "jsonl")
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
_TABLE_SPLITTERS = {"parquet": split_parquet, "arrow": split_arrow}
_TABLE_HASHES = {"parquet": hash_parquet, "arrow": hash_arrow}


@dataclass(frozen=True, slots=True)
class FileSlice:
    """A file, or the part of it that begins in [start, stop), and how it is read.

    Attributes:
        name: The file's path relative to the source's root.
        kind: The name of its reader.
        size: Stored bytes.
        start: The first byte, row group or record batch.
        stop: The end in the same unit; None is the end of the file.
    """

    name: str
    kind: str
    size: int
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class FilePartition:
    """Some small files, or a part of a large one.

    Attributes:
        root: The folder that names are relative to.
        parts: The files, or the one part.
        text_column: The column or field that has the text.
    """

    root: Path
    parts: tuple[FileSlice, ...]
    text_column: str

    @property
    def name(self) -> str:
        """The file and its first byte, row group or batch, or the first file and how many follow."""
        first = self.parts[0]
        if len(self.parts) > 1:
            return f"{first.name} and {len(self.parts) - 1} more"
        return first.name if first.start == 0 and first.stop is None else f"{first.name}, from {first.start}"

    @property
    def size(self) -> int:
        """Stored bytes of the files or the part."""
        return sum(part.size for part in self.parts)

    def content_hash(self) -> str:
        """Hash how each file is read and the bytes that are read of it."""
        digest = hashlib.sha256(f"{READER_VERSION}".encode())
        for part in self.parts:
            column = self.text_column if part.kind in _COLUMN_READERS else ""
            digest.update(f"\0{part.kind}\0{compression_suffix(Path(part.name))}\0{column}\0".encode())
            try:
                digest.update(self._hash_of_part(part))
            except OSError:
                digest.update(b"unreadable")  # reading rejects it too; once it can be read, the hash changes
        return digest.hexdigest()

    def read_chunks(self) -> Iterator[SourceItem]:
        """Yield every document of every file; a damaged file is rejected from the damage on."""
        for part in self.parts:
            try:
                yield from self._read(part)
            except file_io.READ_ERRORS as error:
                yield Rejected("unreadable file", f"{part.name}: {error}")

    def _range_of(self, part: FileSlice) -> FileRange:
        return FileRange(self.root / part.name, part.name, part.start, part.stop)

    def _read(self, part: FileSlice) -> Iterator[SourceItem]:
        if part.kind in _READERS:
            return _READERS[part.kind](self._range_of(part))
        return _COLUMN_READERS[part.kind](self._range_of(part), self.text_column)

    def _hash_of_part(self, part: FileSlice) -> bytes:
        """The sha256 of the stored bytes that a part's documents are read from."""
        file_range = self._range_of(part)
        if part.stop is None:
            with file_range.open_raw() as opened:
                return hashlib.file_digest(opened, "sha256").digest()
        return (
            _TABLE_HASHES[part.kind](file_range, self.text_column)
            if part.kind in _TABLE_HASHES
            else _hash_lines(file_range)
        )


@dataclass(frozen=True)
class FileSource:
    """A file, or every file of a known format in a folder, in the order of relative paths.

    Hidden files and folders are skipped. A link to a file is read; a link to a folder is not.

    Attributes:
        path: The file or folder.
        text_column: The column or field that has the text, in tables and JSON.
        one_document_per_line: Whether each line of a .txt file is a document.
        excluded: A folder below `path` that is skipped.
        partition_bytes: About how many stored bytes a partition has.
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
        """Return the files to read.

        Raises:
            DataError: The path does not exist, or has no file of a known format.
        """
        if self.path.is_file():
            return [self.path]
        if not self.path.is_dir():
            raise DataError(f"the input {self.path} does not exist; give a text file or a folder of them")
        found, _, other = self._walk()
        if not found:
            seen = f" (it has {', '.join(sorted(other)[:8])})" if other else ""
            raise DataError(
                f"no text in the folder {self.path}{seen}; supported formats: {supported_suffixes()}"
            )
        return sorted(found, key=lambda file: file.relative_to(self.path).as_posix())

    def _walk(self) -> tuple[list[Path], list[Path], set[str]]:
        """The folder's files of known formats, its links to folders, and the suffixes of its other files."""
        found: list[Path] = []
        linked_folders: list[Path] = []
        other: set[str] = set()
        for folder_name, folders, names in os.walk(self.path):
            folder = Path(folder_name)
            folders[:] = sorted(
                name for name in folders if not name.startswith(".") and not self._is_excluded(folder / name)
            )
            linked_folders += [folder / name for name in folders if (folder / name).is_symlink()]
            for name in names:
                if name.startswith("."):
                    continue
                file = folder / name
                if _kind(file) is None:
                    other.add("".join(file.suffixes) or name)
                else:
                    found.append(file)
        return found, linked_folders, other

    def link_notes(self) -> list[str]:
        """Return sentences about links to files outside the folder, and to folders, which are not read."""
        if self.path.is_file():
            return []
        root = os.path.realpath(self.path)
        files, folders, _ = self._walk()
        outside = [
            file
            for file in files
            if file.is_symlink() and not Path(os.path.realpath(file)).is_relative_to(root)
        ]
        notes = []
        if outside:
            notes.append(f"read from outside {self.path}, through links: {_named(outside, self.path)}")
        if folders:
            notes.append(
                f"not read in {self.path}, since they are links to folders: {_named(folders, self.path)}"
            )
        return notes

    def partitions(self) -> Sequence[Partition]:
        """Return the partitions, in the order of paths.

        Neighbouring files of less than `partition_bytes` together are one; a larger file is one, or several.
        """
        root = self.path.parent if self.path.is_file() else self.path
        partitions: list[Partition] = []
        group: list[FileSlice] = []
        group_bytes = 0
        for file in self.files():
            parts = self._parts(file, file.relative_to(root).as_posix())
            size = sum(part.size for part in parts)
            if group and (group_bytes + size > self.partition_bytes or len(group) == MAX_FILES_PER_PARTITION):
                partitions.append(FilePartition(root, tuple(group), self.text_column))
                group, group_bytes = [], 0
            if len(parts) == 1:
                group.append(parts[0])
                group_bytes += size
            else:
                partitions += [FilePartition(root, (part,), self.text_column) for part in parts]
        if group:
            partitions.append(FilePartition(root, tuple(group), self.text_column))
        return partitions

    def read_chunks(self) -> Iterator[SourceItem]:
        """Yield every document of every file."""
        return base.read_all(self.partitions())

    def content_hash(self) -> str:
        """Hash how each file is read and its contents, in reading order."""
        return base.combined_hash(self.partitions())

    def size(self) -> int | None:
        """Return the bytes of all files; None if some are compressed."""
        files = self.files()
        return None if any(compression_suffix(file) for file in files) else sum(_size(file) for file in files)

    def _parts(self, file: Path, name: str) -> list[FileSlice]:
        kind, size = _kind(file) or "text", _size(file)
        if (
            kind == "text"
            and self.one_document_per_line
            and format_suffix(file) not in set(TEXT_SUFFIXES) - set(LINE_SUFFIXES)
        ):
            kind = "lines"
        if size > self.partition_bytes and kind in _TABLE_SPLITTERS:
            ranges = _TABLE_SPLITTERS[kind](FileRange(file, name), size, self.partition_bytes)
            if len(ranges) > 1:
                return [FileSlice(name, kind, part_bytes, start, stop) for start, stop, part_bytes in ranges]
        if size > self.partition_bytes and kind in _LINE_KINDS and not compression_suffix(file):
            step = self.partition_bytes
            return [
                FileSlice(name, kind, min(size, start + step) - start, start, start + step)
                for start in range(0, size, step)
            ]
        return [FileSlice(name, kind, size)]

    def _is_excluded(self, folder: Path) -> bool:
        return self.excluded is not None and folder.resolve() == self.excluded.resolve()


def _named(links: list[Path], root: Path) -> str:
    """The first three links with what they point to, and how many more there are."""
    shown = ", ".join(
        f"{_printable(link.relative_to(root))} -> {_printable(os.path.realpath(link))}"
        for link in sorted(links)[:3]
    )
    return shown + (f" and {len(links) - 3:,} more" if len(links) > 3 else "")


def _printable(path: str | Path) -> str:
    """The path as it may be shown: with control characters and bytes that are no text escaped."""
    return str(path) if str(path).isprintable() else ascii(str(path))


def supported_suffixes() -> str:
    """Return the suffixes that are read, as a phrase for help texts and errors."""
    plain = [suffix for suffix in KIND_BY_SUFFIX if suffix not in TABLE_SUFFIXES]
    return f"{', '.join(plain)} (each also with {', '.join(COMPRESSIONS)}), {', '.join(TABLE_SUFFIXES)}"


def _kind(file: Path) -> str | None:
    kind = KIND_BY_SUFFIX.get(format_suffix(file))
    return None if kind in TABLE_SUFFIXES.values() and compression_suffix(file) else kind


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0  # a dangling link: reading rejects it


def _hash_lines(file_range: FileRange) -> bytes:
    """The sha256 of the lines that begin in the range."""
    with file_range.open_raw() as opened:
        offset, end = file_io.line_range(opened, file_range)
        digest = hashlib.sha256()
        opened.seek(offset)
        while block := opened.read(
            file_io.BLOCK_BYTES if end is None else min(file_io.BLOCK_BYTES, end - offset)
        ):
            offset += len(block)
            digest.update(block)
        return digest.digest()
