"""A folder that is split already: the file that a document is in determines its split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from llm_trainer.data.sources import base
from llm_trainer.data.sources.base import Partition, SourceItem, SplitPartition, TextChunk
from llm_trainer.data.sources.file_io import COMPRESSIONS
from llm_trainer.data.sources.file_source import FileSource
from llm_trainer.errors import DataError

SPLIT_FILE_NAMES = {"train": "train", "validation": "val", "test": "test"}
"""Split → the name of the file that it is written to, without a suffix."""
ACCEPTED_SPLIT_NAMES = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}
"""Split → the file names that are read."""
SPLIT_SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")


def find_split_files(folder: Path) -> list[Path]:
    """Return the files with the splits' texts in a folder that was prepared with them."""
    paths = (
        folder / f"{name}{suffix}" for name in SPLIT_FILE_NAMES.values() for suffix in (".txt", ".jsonl")
    )
    return [path for path in paths if path.is_file()]


class PresplitSource:
    """Documents of a folder with one file per split.

    The files are train, val (or validation) and test, as .txt with one document per line, as .jsonl, or as a
    table with a column `text`, compressed or not.

    Args:
        folder: The folder.
        name: The source's name in messages; by default the folder's name.

    Raises:
        DataError: The folder has no training split.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.name = name or folder.resolve().name
        self._files = {
            split: source
            for split, names in ACCEPTED_SPLIT_NAMES.items()
            if (source := _split_file(folder, names)) is not None
        }
        if "train" not in self._files:
            raise DataError(
                f"{folder} has no training split (train.txt, train.jsonl, train.parquet, …); "
                f"make one with scripts/prepare_data.py --output {folder}"
            )

    def partitions(self) -> Sequence[Partition]:
        """Return the partitions of each split's file, labelled with the split."""
        return [
            SplitPartition(partition, split)
            for split, source in self._files.items()
            for partition in source.partitions()
        ]

    def read_chunks(self) -> Iterator[SourceItem]:
        """Yield every document, labelled with its split."""
        return base.read_all(self.partitions())

    def content_hash(self) -> str:
        """Hash the documents and their splits."""
        return base.combined_hash(self.partitions())

    def size(self) -> int:
        """Return the stored bytes of all files."""
        return sum(source.path.stat().st_size for source in self._files.values())

    def fraction(self, split: str) -> float:
        """Return the fraction of all stored bytes that a split has; 0 if there is no such split."""
        source = self._files.get(split)
        return source.path.stat().st_size / max(1, self.size()) if source is not None else 0.0

    def texts(self, split: str) -> Iterator[str]:
        """Yield the texts of a split, if there is one; a document of several megabytes comes in chunks."""
        source = self._files.get(split)
        if source is not None:
            yield from (chunk.text for chunk in source.read_chunks() if isinstance(chunk, TextChunk))

    def held_out_texts(self) -> Iterator[str]:
        """Yield the texts of the test split, else of the validation split, else of the training split."""
        yield from self.texts(
            next(split for split in ("test", "validation", "train") if split in self._files)
        )


def _split_file(folder: Path, names: Sequence[str]) -> FileSource | None:
    paths = (
        folder / f"{name}{suffix}{compression}"
        for name in names
        for suffix in SPLIT_SUFFIXES
        for compression in ("", *COMPRESSIONS)
    )
    return next((FileSource(path, one_document_per_line=True) for path in paths if path.is_file()), None)
