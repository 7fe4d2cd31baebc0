"""Reads a source to its end, for tests of the readers."""

from __future__ import annotations

from pathlib import Path

from llm_trainer.data.sources.base import Rejected
from llm_trainer.data.sources.file_source import FileSource


def read(path: Path, **options: object) -> tuple[list[str], list[Rejected]]:
    """The texts of a file or folder, each joined from its chunks, and what is rejected."""
    texts, rejected, pending = [], [], ""
    for item in FileSource(path, **options).read_chunks():  # type: ignore[arg-type]
        if isinstance(item, Rejected):
            rejected.append(item)
        else:
            pending += item.text
            if item.is_last:
                texts.append(pending)
                pending = ""
    assert pending == ""
    return texts, rejected
