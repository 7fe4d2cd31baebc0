"""A folder that is split already: documents whose split is the file that they stand in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from llm_trainer.data.sources import base as documents
from llm_trainer.data.sources.base import Partition, SourceItem, SplitPartition, TextChunk
from llm_trainer.data.sources.file_io import COMPRESSIONS
from llm_trainer.data.sources.file_source import FileSource
from llm_trainer.errors import DataError

SPLIT_FILE_NAMES = {"train": "train", "validation": "val", "test": "test"}
SPLIT_SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
ACCEPTED_SPLIT_NAMES = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}


def find_split_files(folder: Path) -> list[Path]:
    """The files with the splits' texts in a folder that was prepared with them."""
    paths = (
        folder / f"{name}{suffix}" for name in SPLIT_FILE_NAMES.values() for suffix in (".txt", ".jsonl")
    )
    return [path for path in paths if path.is_file()]


class PresplitSource:
    """Documents of a folder that is split already: train, val (or validation) and test, as .txt (a document a
    line), .jsonl or a table with a column `text`, compressed or not.

    `name` is what it is called; none: as its folder. Raises DataError for a folder without a training split.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.name = name or folder.resolve().name
        self._files = {
            split: source
            for split, names in ACCEPTED_SPLIT_NAMES.items()
            if (source := _split_file(folder, names)) is not None
        }
        if "train" not in self._files:
            way_out = f"make them with scripts/prepare_data.py --output {folder}"
            raise DataError(
                f"{folder} holds no splits (no train.txt, train.jsonl, train.parquet, …); {way_out}"
            )

    def partitions(self) -> Sequence[Partition]:
        """The units of each split's file, marked with the split."""
        return [
            SplitPartition(unit, split)
            for split, source in self._files.items()
            for unit in source.partitions()
        ]

    def read_chunks(self) -> Iterator[SourceItem]:
        """Every document, marked with its split."""
        return documents.read_all(self.partitions())

    def content_hash(self) -> str:
        """Changes with any document and with its split."""
        return documents.combined_hash(self.partitions())

    def size(self) -> int:
        """Bytes of all files."""
        return sum(source.path.stat().st_size for source in self._files.values())

    def share(self, split: str) -> float:
        """A split's share of the whole; 0 where there is none."""
        source = self._files.get(split)
        return source.path.stat().st_size / max(1, self.size()) if source is not None else 0.0

    def texts(self, split: str) -> Iterator[str]:
        """The texts of a split; none where there is no such split. A document above a few megabytes comes in
        pieces.
        """
        source = self._files.get(split)
        if source is not None:
            yield from (piece.text for piece in source.read_chunks() if isinstance(piece, TextChunk))

    def held_out(self) -> Iterator[str]:
        """The texts of the test split, else of validation, else of training."""
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
