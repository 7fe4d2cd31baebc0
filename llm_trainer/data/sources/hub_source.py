"""Documents from a data set on the Hugging Face hub, or a folder laid out like one, through the `datasets`
library (an extra).

Either it is downloaded, and its units are runs of rows, or it is streamed: then a unit is one of the files
that it is stored in, read over the network each time it is needed and kept nowhere. What is streamed is known
by its commit, which stands for the contents; hashing the texts would take the whole download.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from llm_trainer.data.sources import base as documents
from llm_trainer.data.sources.base import Partition, Rejected, SourceItem, SplitPartition
from llm_trainer.data.sources.parquet_arrow import hash_text_column, read_text_column
from llm_trainer.errors import DataError

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset, IterableDataset

_UNIT_BYTES = 32 * 2**20
_BATCH_BYTES = 4 * 2**20
_MOST_ROWS = 1000


@dataclass(frozen=True)
class HubSplit:
    """One split of a data set, and the column that is read."""

    dataset: str
    configuration: str | None
    split: str
    text_column: str
    revision: str | None

    @property
    def label(self) -> str:
        """What messages call it; of a local folder its own name alone."""
        return f"{Path(self.dataset).resolve().name if Path(self.dataset).is_dir() else self.dataset}, {self.split}"


@dataclass(frozen=True)
class HubRowsPartition:
    """Some rows of a split that has been downloaded: [start, stop)."""

    rows: HubSplit
    start: int
    stop: int
    size: int

    @property
    def name(self) -> str:
        """The split and its rows."""
        return f"{self.rows.split} rows {self.start} to {self.stop - 1}"

    def content_hash(self) -> str:
        """sha256 over the texts."""
        digest = hashlib.sha256()
        for _, column in self._columns():
            hash_text_column(column, digest)
        return digest.hexdigest()

    def read_chunks(self) -> Iterator[SourceItem]:
        """Every row's text."""
        for row, column in self._columns():
            yield from read_text_column(column, self.rows.text_column, f"{self.rows.label} row", row)

    def _columns(self) -> Iterator[tuple[int, pyarrow.Array]]:
        """(first row, texts) of a few rows at a time."""
        loaded = _load(self.rows).with_format("arrow")
        step = max(1, min(_MOST_ROWS, _BATCH_BYTES * (self.stop - self.start) // max(1, self.size)))
        for row in range(self.start, self.stop, step):
            for chunk in loaded[row : min(row + step, self.stop)].column(self.rows.text_column).chunks:
                yield row, chunk
                row += len(chunk)


@dataclass(frozen=True)
class HubFilePartition:
    """One of the `count` files that a split is stored in, streamed."""

    rows: HubSplit
    index: int
    count: int
    size: int

    @property
    def name(self) -> str:
        """The split and the file's number."""
        return f"{self.rows.split} file {self.index} of {self.count}"

    def content_hash(self) -> str:
        """Of the commit and the place in it; for a local folder, which has no commit, sha256 over the texts."""
        digest = hashlib.sha256()
        if self.rows.revision is None:
            for column in (column for _, column in self._columns() if column is not None):
                hash_text_column(column, digest)
        else:
            digest.update(
                repr(
                    (self.rows.revision, self.rows.configuration, self.rows.split, self.rows.text_column)
                ).encode()
            )
            digest.update(f"{self.index} of {self.count}".encode())
        return digest.hexdigest()

    def read_chunks(self) -> Iterator[SourceItem]:
        """Every row's text. Raises DataError where the network fails midway."""
        for row, column in self._columns():
            where = f"{self.rows.label} file {self.index} row"
            if column is None:
                yield Rejected(f"no text in the column {self.rows.text_column!r}", f"{where} {row}")
            else:
                yield from read_text_column(column, self.rows.text_column, where, row)

    def _columns(self) -> Iterator[tuple[int, pyarrow.Array | None]]:
        """(first row, texts, None where the column is missing) of a few rows at a time."""
        row = 0
        with _explained(self.rows.dataset):
            shard = _load(self.rows, streaming=True).shard(self.count, self.index).with_format("arrow")
            for table in shard.iter(_MOST_ROWS):
                chunks = (
                    table.column(self.rows.text_column).chunks
                    if self.rows.text_column in table.column_names
                    else [None]
                )
                for chunk in chunks:
                    yield row, chunk
                    row += table.num_rows if chunk is None else len(chunk)


@dataclass(frozen=True)
class HubSource:
    """One column of a hub data set; with `validation_split` that split is the validation set as it stands."""

    dataset: str
    configuration: str | None
    train_split: str
    validation_split: str | None
    text_column: str
    revision: str | None = None
    streaming: bool = False

    @property
    def name(self) -> str:
        """The hub's name, or a local folder's own."""
        return Path(self.dataset).resolve().name if Path(self.dataset).is_dir() else self.dataset

    def partitions(self) -> Sequence[Partition]:
        """Runs of rows, or files. Raises DataError where the data set or the column cannot be had."""
        training = self._units_of(self.train_split)
        if self.validation_split is None:
            return training
        validation = self._units_of(self.validation_split)
        return [
            *(SplitPartition(unit, "train") for unit in training),
            *(SplitPartition(unit, "validation") for unit in validation),
        ]

    def read_chunks(self) -> Iterator[SourceItem]:
        """Every row's text."""
        return documents.read_all(self.partitions())

    def content_hash(self) -> str:
        """Over all texts and their splits."""
        return documents.combined_hash(self.partitions())

    def size(self) -> None:
        """Unknown."""
        return None

    def _units_of(self, split: str) -> list[Partition]:
        rows = HubSplit(self.dataset, self.configuration, split, self.text_column, self.revision)
        if self.streaming:
            rows = replace(rows, revision=_commit(self.dataset, self.revision))
            streamed = _load(rows, streaming=True)
            size = (streamed.info.download_size or 0) // streamed.num_shards
            return [
                HubFilePartition(rows, index, streamed.num_shards, size)
                for index in range(streamed.num_shards)
            ]
        loaded = _load(rows)
        row_bytes = max(1, loaded.data.nbytes // max(1, len(loaded)))
        step = max(1, _UNIT_BYTES // row_bytes)
        starts = range(0, len(loaded), step)
        return [
            HubRowsPartition(
                rows, start, min(start + step, len(loaded)), min(step, len(loaded) - start) * row_bytes
            )
            for start in starts
        ]


@lru_cache(maxsize=4)  # a worker opens a data set once, not for each unit
def _load(rows: HubSplit, streams: bool = False) -> Dataset | IterableDataset:
    with _explained(rows.dataset) as datasets:
        loaded = datasets.load_dataset(
            rows.dataset, rows.configuration, split=rows.split, revision=rows.revision, streaming=streams
        )
    if loaded.column_names is not None and rows.text_column not in loaded.column_names:
        columns = ", ".join(loaded.column_names)
        raise DataError(
            f"{rows.label} has no column {rows.text_column!r}, it has {columns}; name one with --text_column"
        )
    return loaded


def _commit(dataset: str, revision: str | None) -> str | None:
    """The commit that a branch or tag stands for now; None for a local folder."""
    if Path(dataset).is_dir():
        return None
    from huggingface_hub import HfApi

    with _explained(dataset):
        return HfApi().dataset_info(dataset, revision=revision).sha


@contextlib.contextmanager
def _explained(dataset: str) -> Iterator[ModuleType]:
    """The library; what it raises about the hub, the network or the data becomes a DataError."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            "reading data sets from the hub needs the extra 'hub': pip install 'llm-trainer[hub]'"
        ) from None
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # HTTPError is its client's, whose name changed

    try:
        yield datasets
    except (OSError, ValueError, RuntimeError, HTTPError, datasets.exceptions.DatasetsError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"the data set {dataset!r} could not be loaded from the hub ({first}); without a network, download it elsewhere "
            "and give its files with --input"
        ) from None
