"""Documents from a dataset on the Hugging Face hub, or from a folder in the hub's layout.

They are read through the `datasets` library, which the extra `hub` installs.

The dataset is either downloaded, and its partitions are runs of rows, or streamed. When it is streamed, a
partition is one of the files that it is stored in, which is read over the network each time it is needed and
never cached. A streamed dataset is identified by its commit, because hashing the texts would take the full
download.
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

from llm_trainer.data.optional_deps import missing_extra
from llm_trainer.data.sources import base
from llm_trainer.data.sources.base import Partition, Rejected, SourceItem, SplitPartition
from llm_trainer.data.sources.parquet_arrow import hash_text_column, read_text_column
from llm_trainer.errors import DataError

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset, IterableDataset

_PARTITION_BYTES = 32 * 2**20
_BATCH_BYTES = 4 * 2**20
_MAX_ROWS = 1000
_ADVICE = "; without a network, download it elsewhere and give its files with --input"


@dataclass(frozen=True)
class HubSplit:
    """One split of a dataset, and the column that is read.

    Attributes:
        dataset: The name on the hub, or a local folder.
        configuration: The configuration's name; None for the only one.
        split: The split's name.
        text_column: The column that has the text.
        revision: A branch, tag or commit; None for the newest.
    """

    dataset: str
    configuration: str | None
    split: str
    text_column: str
    revision: str | None

    @property
    def label(self) -> str:
        """The name used in messages; of a local folder only its own name."""
        return f"{_short_name(self.dataset)}, {self.split}"


@dataclass(frozen=True)
class HubRowsPartition:
    """The rows [start, stop) of a split that has been downloaded."""

    rows: HubSplit
    start: int
    stop: int
    size: int

    @property
    def name(self) -> str:
        """The split and its rows."""
        return f"{self.rows.split} rows {self.start} to {self.stop - 1}"

    def content_hash(self) -> str:
        """Hash the texts."""
        digest = hashlib.sha256()
        for _, column in self._columns():
            hash_text_column(column, digest)
        return digest.hexdigest()

    def read_chunks(self) -> Iterator[SourceItem]:
        """Yield every row's text."""
        for row, column in self._columns():
            yield from read_text_column(column, self.rows.text_column, f"{self.rows.label} row", row)

    def _columns(self) -> Iterator[tuple[int, pyarrow.Array]]:
        """(first row, texts) of a few rows at a time."""
        loaded = _load(self.rows).with_format("arrow")
        step = max(1, min(_MAX_ROWS, _BATCH_BYTES * (self.stop - self.start) // max(1, self.size)))
        for row in range(self.start, self.stop, step):
            for chunk in loaded[row : min(row + step, self.stop)].column(self.rows.text_column).chunks:
                yield row, chunk
                row += len(chunk)


@dataclass(frozen=True)
class HubFilePartition:
    """File `index` of the `count` files that a split is stored in, streamed."""

    rows: HubSplit
    index: int
    count: int
    size: int

    @property
    def name(self) -> str:
        """The split and the file's number."""
        return f"{self.rows.split} file {self.index} of {self.count}"

    def content_hash(self) -> str:
        """Hash the commit and the file's number; for a local folder, which has no commit, the texts."""
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
        """Yield every row's text. Raises DataError if the network fails midway."""
        for row, column in self._columns():
            where = f"{self.rows.label} file {self.index} row"
            if column is None:
                yield Rejected(f"no text in the column {self.rows.text_column!r}", f"{where} {row}")
            else:
                yield from read_text_column(column, self.rows.text_column, where, row)

    def _columns(self) -> Iterator[tuple[int, pyarrow.Array | None]]:
        """(first row, texts, None if the column is missing) of a few rows at a time."""
        row = 0
        with hub_errors(f"the dataset {self.rows.dataset!r}", _ADVICE):
            shard = _load(self.rows, streaming=True).shard(self.count, self.index).with_format("arrow")
            for table in shard.iter(_MAX_ROWS):
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
    """One text column of a dataset on the hub.

    Attributes:
        dataset: The name on the hub, or a local folder in the hub's layout.
        configuration: The configuration's name; None for the only one.
        train_split: The split to train on.
        validation_split: A split that is the validation set unchanged; None to hold out part of the training
            split.
        text_column: The column that has the text.
        revision: A branch, tag or commit; None for the newest.
        streaming: Whether files are read over the network instead of being downloaded first.
    """

    dataset: str
    configuration: str | None
    train_split: str
    validation_split: str | None
    text_column: str
    revision: str | None = None
    streaming: bool = False

    @property
    def name(self) -> str:
        """The name on the hub, or a local folder's own."""
        return _short_name(self.dataset)

    def partitions(self) -> Sequence[Partition]:
        """Return runs of rows, or files.

        Raises:
            DataError: The dataset or the column cannot be found or loaded.
        """
        training = self._partitions_of(self.train_split)
        if self.validation_split is None:
            return training
        validation = self._partitions_of(self.validation_split)
        return [
            *(SplitPartition(partition, "train") for partition in training),
            *(SplitPartition(partition, "validation") for partition in validation),
        ]

    def read_chunks(self) -> Iterator[SourceItem]:
        """Yield every row's text."""
        return base.read_all(self.partitions())

    def content_hash(self) -> str:
        """Hash all texts and their splits."""
        return base.combined_hash(self.partitions())

    def size(self) -> None:
        """Return None: only reading could determine it."""
        return None

    def _partitions_of(self, split: str) -> list[Partition]:
        rows = HubSplit(self.dataset, self.configuration, split, self.text_column, self.revision)
        if self.streaming:
            rows = replace(rows, revision=_commit(self.dataset, self.revision))
            streamed = _load(rows, streaming=True)
            count = streamed.num_shards
            size = (streamed.info.download_size or 0) // count
            return [HubFilePartition(rows, index, count, size) for index in range(count)]
        loaded = _load(rows)
        row_bytes = max(1, loaded.data.nbytes // max(1, len(loaded)))
        step = max(1, _PARTITION_BYTES // row_bytes)
        return [
            HubRowsPartition(
                rows, start, min(start + step, len(loaded)), min(step, len(loaded) - start) * row_bytes
            )
            for start in range(0, len(loaded), step)
        ]


@contextlib.contextmanager
def hub_errors(what: str, advice: str = "") -> Iterator[ModuleType]:
    """Turn what `datasets` raises about the hub, the network or the data into a DataError.

    Args:
        what: What is loaded; the message begins with it.
        advice: What the user can do; the message ends with it.

    Yields:
        The `datasets` module.

    Raises:
        DataError: `datasets` is not installed, or it failed.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(missing_extra("reading datasets from the hub", "hub")) from None
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of its HTTP client, which differs by version

    try:
        yield datasets
    except (OSError, ValueError, RuntimeError, HTTPError, datasets.exceptions.DatasetsError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{what} could not be loaded from the hub ({first}){advice}") from None


def _short_name(dataset: str) -> str:
    return Path(dataset).resolve().name if Path(dataset).is_dir() else dataset


@lru_cache(maxsize=4)  # so that a worker opens a dataset once, not once per partition
def _load(rows: HubSplit, streaming: bool = False) -> Dataset | IterableDataset:
    with hub_errors(f"the dataset {rows.dataset!r}", _ADVICE) as datasets:
        loaded = datasets.load_dataset(
            rows.dataset, rows.configuration, split=rows.split, revision=rows.revision, streaming=streaming
        )
    if loaded.column_names is not None and rows.text_column not in loaded.column_names:
        columns = ", ".join(loaded.column_names)
        raise DataError(
            f"{rows.label} has no column {rows.text_column!r}, only {columns}; name one with --text_column"
        )
    return loaded


def _commit(dataset: str, revision: str | None) -> str | None:
    """The commit that a branch or tag refers to now; None for a local folder."""
    if Path(dataset).is_dir():
        return None
    from huggingface_hub import HfApi

    with hub_errors(f"the dataset {dataset!r}", _ADVICE):
        return HfApi().dataset_info(dataset, revision=revision).sha
