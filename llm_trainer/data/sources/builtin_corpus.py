"""The corpus that needs no network: text that every Python installation holds.

The language reference as `help()` shows it (`pydoc_data.topics`, about half a megabyte of English) and the
standard library's own sources (about ten megabytes of code with prose in it). Tests, vendored copies and
tables of character codes are left out: they are long and say little. What is there differs a little between
versions of Python, so the version belongs to the contents' hash.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_trainer.data.sources import base as documents
from llm_trainer.data.sources.base import Partition, SourceItem, text_chunks
from llm_trainer.errors import DataError

_LEFT_OUT = {
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
    "pydoc_data",
    "_vendor",
}
_UNIT_BYTES = 2 * 2**20


@dataclass(frozen=True)
class BuiltinPartition:
    """The language reference (no `files`), or some files of the standard library."""

    name: str
    size: int
    files: tuple[str, ...] = ()

    def content_hash(self) -> str:
        """sha256 over all texts."""
        digest = hashlib.sha256()
        for _, raw in self._texts():
            digest.update(raw + b"\0")
        return digest.hexdigest()

    def read_chunks(self) -> Iterator[SourceItem]:
        """Every topic, or every source file."""
        for name, raw in self._texts():
            yield from text_chunks(raw.decode("utf-8", errors="replace"), name)

    def _texts(self) -> Iterator[tuple[str, bytes]]:
        if self.files:
            yield from read_library(self.files)
        else:
            yield from ((f"topic {topic}", text.encode("utf-8")) for topic, text in language_reference())


class BuiltinSource:
    """The language reference, topic by topic, then the standard library, file by file; always in the same
    order.
    """

    name = "builtin"

    def partitions(self) -> Sequence[Partition]:
        """The reference, and the library in parts of about `_UNIT_BYTES`."""
        reference = sum(len(text.encode("utf-8")) for _, text in language_reference())
        units: list[Partition] = [BuiltinPartition("language reference", reference)]
        group: list[str] = []
        size = 0
        for name in library_files():
            group.append(name)
            size += library_size(name)
            if size >= _UNIT_BYTES:
                units.append(BuiltinPartition(f"standard library up to {name}", size, tuple(group)))
                group, size = [], 0
        return (
            [*units, BuiltinPartition("rest of the standard library", size, tuple(group))] if group else units
        )

    def read_chunks(self) -> Iterator[SourceItem]:
        """Every topic and every source file."""
        return documents.read_all(self.partitions())

    def content_hash(self) -> str:
        """sha256 over all texts."""
        return documents.combined_hash(self.partitions())

    def size(self) -> int:
        """Bytes of all texts."""
        return sum(unit.size for unit in self.partitions())

    def sizes(self) -> dict[str, int]:
        """Bytes of each of the two parts, for the console."""
        reference, *library = (unit.size for unit in self.partitions())
        python = ".".join(map(str, sys.version_info[:2]))
        return {
            f"language reference of Python {python}": reference,
            f"standard library of Python {python}": sum(library),
        }


def language_reference() -> list[tuple[str, str]]:
    """(topic, text) by topic; raises DataError where this Python was installed without them."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            "this Python has no pydoc_data.topics (the built-in corpus); give a text with --input"
        ) from None
    return sorted((str(name), str(text)) for name, text in topics.items())


def library_files() -> list[str]:
    """The path within the library of each source file, sorted."""
    root = _library()
    found: list[str] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name for name in folders if name not in _LEFT_OUT
        ]  # site-packages alone may hold a hundred thousand files
        found += [
            (Path(folder) / name).relative_to(root).as_posix() for name in names if name.endswith(".py")
        ]
    return sorted(found)


def library_size(name: str) -> int:
    """Bytes of a source file; 0 where it cannot be read."""
    try:
        return (_library() / name).stat().st_size
    except OSError:
        return 0


def read_library(names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """(path within the library, contents) of these source files."""
    for name in names:
        try:
            yield name, (_library() / name).read_bytes()
        except OSError:
            continue  # a link to nowhere, or a file that this user may not read: the corpus does without


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])
