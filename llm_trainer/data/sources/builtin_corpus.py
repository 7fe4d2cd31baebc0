"""The corpus that needs no network: text that is part of every Python installation.

It is the language reference as `help()` shows it (`pydoc_data.topics`, about half a megabyte of English) and
the standard library's own sources (about ten megabytes of code with prose in it). Tests, vendored copies and
tables of character codes are excluded, because they are long and uninformative. The text differs a little
between versions of Python, and the content hash differs with it.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_trainer.data.sources import base
from llm_trainer.data.sources.base import Partition, SourceItem, text_chunks
from llm_trainer.errors import DataError

_EXCLUDED_FOLDERS = {
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
_PARTITION_BYTES = 2 * 2**20


@dataclass(frozen=True)
class BuiltinPartition:
    """The language reference (if `files` is empty), or some files of the standard library."""

    name: str
    size: int
    files: tuple[str, ...] = ()

    def content_hash(self) -> str:
        """Hash all texts."""
        digest = hashlib.sha256()
        for _, raw in self._texts():
            digest.update(raw + b"\0")
        return digest.hexdigest()

    def read_chunks(self) -> Iterator[SourceItem]:
        """Yield every topic, or every source file."""
        for name, raw in self._texts():
            yield from text_chunks(raw.decode("utf-8", errors="replace"), name)

    def _texts(self) -> Iterator[tuple[str, bytes]]:
        if self.files:
            yield from read_library(self.files)
        else:
            yield from ((f"topic {topic}", text.encode("utf-8")) for topic, text in language_reference())


class BuiltinSource:
    """The language reference, topic by topic, then the standard library, file by file, in a fixed order."""

    name = "builtin"

    def partitions(self) -> Sequence[Partition]:
        """Return the reference, and the library in parts of about `_PARTITION_BYTES`."""
        reference = sum(len(text.encode("utf-8")) for _, text in language_reference())
        partitions: list[Partition] = [BuiltinPartition("language reference", reference)]
        group: list[str] = []
        size = 0
        for name in library_files():
            group.append(name)
            size += library_size(name)
            if size >= _PARTITION_BYTES:
                partitions.append(BuiltinPartition(f"standard library up to {name}", size, tuple(group)))
                group, size = [], 0
        if group:
            partitions.append(BuiltinPartition("rest of the standard library", size, tuple(group)))
        return partitions

    def read_chunks(self) -> Iterator[SourceItem]:
        """Yield every topic and every source file."""
        return base.read_all(self.partitions())

    def content_hash(self) -> str:
        """Hash all texts."""
        return base.combined_hash(self.partitions())

    def size(self) -> int:
        """Return the bytes of all texts."""
        return sum(partition.size for partition in self.partitions())

    def sizes(self) -> dict[str, int]:
        """Return the bytes of the reference and of the library, by a name for the console."""
        reference, *library = (partition.size for partition in self.partitions())
        python = ".".join(map(str, sys.version_info[:2]))
        return {
            f"language reference of Python {python}": reference,
            f"standard library of Python {python}": sum(library),
        }


def language_reference() -> list[tuple[str, str]]:
    """Return (topic, text) of the language reference, sorted by topic.

    Raises:
        DataError: This Python was installed without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            "this Python has no pydoc_data.topics (the built-in corpus); give a text with --input"
        ) from None
    return sorted((str(name), str(text)) for name, text in topics.items())


def library_files() -> list[str]:
    """Return the path of each source file within the standard library, sorted."""
    root = _library()
    found: list[str] = []
    for folder, folders, names in os.walk(root):
        # In place, so that the walk skips them: site-packages alone may have a hundred thousand files.
        folders[:] = [name for name in folders if name not in _EXCLUDED_FOLDERS]
        found += [
            (Path(folder) / name).relative_to(root).as_posix() for name in names if name.endswith(".py")
        ]
    return sorted(found)


def library_size(name: str) -> int:
    """Return the bytes of a source file of the standard library; 0 if it cannot be read."""
    try:
        return (_library() / name).stat().st_size
    except OSError:
        return 0


def read_library(names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (path within the standard library, contents) of these source files."""
    for name in names:
        try:
            yield name, (_library() / name).read_bytes()
        except OSError:
            continue  # a dangling link, or a file that this user may not read: the corpus omits it


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])
