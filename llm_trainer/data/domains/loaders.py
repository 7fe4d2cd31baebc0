"""Reads the datasets that domain loaders define: from local files with the same fields, or from the hub."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llm_trainer.config.schema.domain_loaders import DomainLoader, HubDataset
from llm_trainer.config.schema.domains import LoaderOptions
from llm_trainer.data.domains.templates import RecordFormatter, RecordRejected
from llm_trainer.data.hashing import hash_fraction
from llm_trainer.data.sources.base import Record, Rejected
from llm_trainer.data.sources.hub_source import hub_errors
from llm_trainer.data.sources.record_reader import RECORD_SUFFIXES, read_local_records
from llm_trainer.errors import DataError

_MAX_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class DomainText:
    """A text of a domain, and the name of the loader that read it."""

    text: str
    domain: str
    loader: str


@dataclass
class LoaderStats:
    """What one loader read; records = texts + records left out, each with its reason.

    Attributes:
        loader: The loader's name.
        origin: The path or dataset that it read.
        records: Records read.
        texts: Records that became texts.
        left_out: Records left out, by reason.
        examples: The position and reason of the first records left out.
    """

    loader: str
    origin: str = ""
    records: int = 0
    texts: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def leave_out(self, reason: str, where: str) -> None:
        """Count a record that does not become a text."""
        self.left_out[reason] += 1
        if len(self.examples) < _MAX_EXAMPLES:
            self.examples.append(f"{where}: {reason}")

    def line(self) -> str:
        """Return the counts as a line for the console."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.most_common())
        left_out = f"; {self.left_out.total():,} left out ({reasons})" if reasons else ""
        return f"{self.loader} ({self.origin}): {self.texts:,} texts of {self.records:,} records{left_out}"


def read_loader(
    stats: LoaderStats,
    loader: DomainLoader,
    options: LoaderOptions,
    local_dir: Path,
    seed: int,
    max_texts: int | None,
) -> Iterator[DomainText]:
    """Yield the texts of one loader.

    Args:
        stats: Names the loader; its counts are updated while texts are read.
        loader: The loader's definition.
        options: The user's options for it.
        local_dir: The folder that may have a local copy.
        seed: The seed of the sample, if `n_examples` is set.
        max_texts: Reading stops after so many texts, or after `max_samples`.

    Raises:
        DataError: The dataset is neither a local file nor available on the hub.
    """
    formatter = RecordFormatter(loader, options)
    limits = [limit for limit in (max_texts, options.max_samples) if limit is not None]
    records = read_records(stats, loader, options, local_dir)
    texts = _format_records(stats, records, formatter, min(limits, default=None))
    if options.n_examples is None:
        yield from texts
        return
    drawn = heapq.nsmallest(
        options.n_examples,
        enumerate(texts),
        key=lambda numbered: hash_fraction(numbered[1].text, f"examples {seed}"),
    )
    if stats.texts > len(drawn):
        stats.left_out["not among the n_examples drawn"] += stats.texts - len(drawn)
        stats.texts = len(drawn)
    yield from (text for _, text in sorted(drawn, key=lambda numbered: numbered[0]))


def _format_records(
    stats: LoaderStats, records: Iterator[Record | Rejected], formatter: RecordFormatter, limit: int | None
) -> Iterator[DomainText]:
    for record in records:
        stats.records += 1
        if isinstance(record, Rejected):
            stats.leave_out(record.reason, record.where)
            continue
        try:
            text = formatter.text(record.fields)
        except RecordRejected as reason:
            stats.leave_out(str(reason), record.where)
            continue
        stats.texts += 1
        yield DomainText(text, formatter.domain(record.fields, record.part), stats.loader)
        if stats.texts == limit:
            return


def read_records(
    stats: LoaderStats, loader: DomainLoader, options: LoaderOptions, local_dir: Path
) -> Iterator[Record | Rejected]:
    """Yield the records of a loader: from the path that is set, else from a local copy, else from the hub.

    Args:
        stats: Names the loader; its `origin` is set.
        loader: The loader's definition.
        options: The user's options for it.
        local_dir: The folder that may have a local copy.

    Raises:
        DataError: The dataset cannot be found or read, or `split` is set for a local copy.
    """
    path = find_local_path(stats.loader, loader, options, local_dir)
    if path is not None:
        if options.split is not None:
            raise DataError(
                f"split={options.split} is for the hub, but the texts are read from {path}; leave it out"
            )
        stats.origin = str(path)
        yield from read_local_records(path)
        return
    for part in loader.hub:
        configurations: list[str | None] = [*part.configurations] or [None]
        for configuration in configurations:
            stats.origin = f"{part.name} on the hub"
            yield from _hub_records(part, configuration, options.split or part.split)


def find_local_path(name: str, loader: DomainLoader, options: LoaderOptions, local_dir: Path) -> Path | None:
    """Return the local file or folder that a loader reads, or None.

    Args:
        name: The loader's name; a local copy has this name, with or without `load_`.
        loader: The loader's definition.
        options: The user's options for it.
        local_dir: The folder that may have a local copy.

    Raises:
        DataError: A path is set and does not exist.
    """
    path = options.path or loader.path
    if path is not None:
        if not Path(path).exists():
            raise DataError(
                f"{path} does not exist; give a file, or a folder of files ({', '.join(RECORD_SUFFIXES)})"
            )
        return Path(path)
    names = [
        stem + suffix for stem in (name, name.removeprefix("load_")) for suffix in ("", *RECORD_SUFFIXES)
    ]
    return next((local_dir / copy for copy in names if (local_dir / copy).exists()), None)


def _hub_records(part: HubDataset, configuration: str | None, split: str) -> Iterator[Record | Rejected]:
    """The rows of one configuration, streamed. Raises DataError if it cannot be loaded."""
    name = f"{part.name}, {configuration}" if configuration else part.name
    with hub_errors(name):
        for index, row in enumerate(_stream(part, configuration, split)):
            yield Record(row, name, f"{name}, {split} row {index}")


def _stream(part: HubDataset, configuration: str | None, split: str) -> Iterable[Mapping[str, object]]:
    import datasets

    if part.files:  # one by one, since their fields may differ
        streams = (
            datasets.load_dataset("json", data_files=hub_file_url(part, file), split="train", streaming=True)
            for file in part.files
        )
        return itertools.chain.from_iterable(streams)
    rows: Iterable[Mapping[str, object]] = datasets.load_dataset(
        part.name, configuration, split=split, revision=part.revision, streaming=True
    )
    return rows


def hub_file_url(part: HubDataset, file: str) -> str:
    """Return the address of one file of a repository on the hub, which `datasets` can read."""
    return f"hf://datasets/{part.name}{f'@{part.revision}' if part.revision else ''}/{file}"
