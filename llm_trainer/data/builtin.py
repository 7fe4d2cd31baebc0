"""The corpus that needs no network: text that every Python installation holds.

The language reference as `help()` shows it (`pydoc_data.topics`, about half a megabyte of English) and the standard library's own sources
(about ten megabytes of code with prose in it). Tests, vendored copies and tables of character codes are left out: they are long
and say little. What is there differs a little between versions of Python, so the version belongs to the contents' hash.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from llm_trainer.config.errors import DataError
from llm_trainer.data.documents import Reading, judged

_LEFT_OUT = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "_vendor"}


class BuiltinSource:
    """The language reference, topic by topic, then the standard library, file by file; always in the same order."""

    name = "builtin"

    def pieces(self) -> Iterator[Reading]:
        """Every topic and every source file."""
        for topic, text in language_reference():
            yield from judged(text, f"topic {topic}")
        for file, raw in standard_library():
            yield from judged(raw.decode("utf-8", errors="replace"), file)

    def content_hash(self) -> str:
        """sha256 over all texts."""
        digest = hashlib.sha256()
        for _, text in language_reference():
            digest.update(text.encode("utf-8") + b"\0")
        for _, raw in standard_library():
            digest.update(raw + b"\0")
        return digest.hexdigest()

    def size(self) -> int:
        """Bytes of all texts."""
        return sum(self.sizes().values())

    def sizes(self) -> dict[str, int]:
        """Bytes of each of the two parts, for the console."""
        reference = sum(len(text.encode("utf-8")) for _, text in language_reference())
        python = ".".join(map(str, sys.version_info[:2]))
        return {
            f"language reference of Python {python}": reference,
            f"standard library of Python {python}": sum(len(raw) for _, raw in standard_library()),
        }


def language_reference() -> list[tuple[str, str]]:
    """(topic, text) by topic; raises DataError where this Python was installed without them."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError("this Python has no pydoc_data.topics (the built-in corpus); give a text with --input") from None
    return sorted((str(name), str(text)) for name, text in topics.items())


def standard_library() -> Iterator[tuple[str, bytes]]:
    """(path within the library, contents) of each source file, by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[str] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]  # site-packages alone may hold a hundred thousand files
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in names if name.endswith(".py")]
    for name in sorted(found):
        try:
            yield name, (root / name).read_bytes()
        except OSError:
            continue  # a link to nowhere, or a file that this user may not read: the corpus does without
