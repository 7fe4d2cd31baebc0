"""Reading the data sets of the loader table: from the hub, or from local files with the same fields."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llm_trainer.config.schema.domain_loaders import DomainLoader, HubPart
from llm_trainer.config.schema.domains import LoaderOptions
from llm_trainer.data.domains.templates import RecordFormatter, RecordRejected
from llm_trainer.data.pipeline.splits import hash_fraction
from llm_trainer.data.sources.base import Rejected
from llm_trainer.data.sources.record_reader import RECORD_SUFFIXES, Record, read_local_records
from llm_trainer.errors import DataError

_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class DomainText:
    """A text of a domain, and the loader that it is from."""

    text: str
    domain: str
    loader: str


@dataclass
class LoaderStats:
    """One loader at work: what it read from, and what came of it. Records read = texts + left out, each with
    its reason.
    """

    loader: str
    origin: str = ""
    records: int = 0
    texts: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def leave_out(self, reason: str, where: str) -> None:
        """Count a record that gives no text."""
        self.left_out[reason] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{where}: {reason}")

    def line(self) -> str:
        """For the console."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.most_common())
        left_out = f"; {self.left_out.total():,} left out ({reasons})" if reasons else ""
        return f"{self.loader} ({self.origin}): {self.texts:,} texts of {self.records:,} records{left_out}"


def read_loader(
    reading: LoaderStats,
    row: DomainLoader,
    options: LoaderOptions,
    local_dir: Path,
    seed: int,
    most: int | None,
) -> Iterator[DomainText]:
    """The texts of one loader; `reading` is filled on the way. Reading stops after `most` texts, or after
    `max_samples`.

    Raises DataError where the data set can neither be found locally nor be had from the hub.
    """
    maker = RecordFormatter(row, options)
    limits = [limit for limit in (most, options.max_samples) if limit is not None]
    examples = _examples(
        reading, read_records(reading, row, options, local_dir), maker, min(limits, default=None)
    )
    if options.n_examples is None:
        yield from examples
        return
    drawn = heapq.nsmallest(
        options.n_examples,
        enumerate(examples),
        key=lambda numbered: hash_fraction(numbered[1].text, f"examples {seed}"),
    )
    if reading.texts > len(drawn):
        reading.left_out["not among the n_examples drawn"] += reading.texts - len(drawn)
        reading.texts = len(drawn)
    yield from (example for _, example in sorted(drawn, key=lambda numbered: numbered[0]))


def _examples(
    reading: LoaderStats, found: Iterator[Record | Rejected], maker: RecordFormatter, limit: int | None
) -> Iterator[DomainText]:
    for record in found:
        reading.records += 1
        if isinstance(record, Rejected):
            reading.leave_out(record.reason, record.where)
            continue
        try:
            text = maker.text(record.fields)
        except RecordRejected as reason:
            reading.leave_out(str(reason), record.where)
            continue
        reading.texts += 1
        yield DomainText(text, maker.domain(record.fields, record.part), reading.loader)
        if reading.texts == limit:
            return


def read_records(
    reading: LoaderStats, row: DomainLoader, options: LoaderOptions, local_dir: Path
) -> Iterator[Record | Rejected]:
    """The records of a loader, and where they are from noted in `reading`: the path that was said, else a
    local copy, else the hub.
    """
    path = find_local_path(reading.loader, row, options, local_dir)
    if path is not None:
        if options.split is not None:
            raise DataError(
                f"split={options.split} is for the hub, and the texts are read from {path}; leave it out"
            )
        reading.origin = str(path)
        yield from read_local_records(path)
        return
    for part in row.hub:
        configurations: list[str | None] = [*part.configurations] or [None]
        for configuration in configurations:
            reading.origin = f"{part.name} on the hub"
            yield from _hub_records(part, configuration, options.split or part.split)


def find_local_path(loader: str, row: DomainLoader, options: LoaderOptions, local_dir: Path) -> Path | None:
    """The local file or folder that a loader reads, if any. Raises DataError where one is named and missing."""
    said = options.path or row.path
    if said is not None:
        if not Path(said).exists():
            raise DataError(
                f"{said} does not exist; its path must be a file or a folder of them ({', '.join(RECORD_SUFFIXES)})"
            )
        return Path(said)
    names = [
        name + suffix for name in (loader, loader.removeprefix("load_")) for suffix in ("", *RECORD_SUFFIXES)
    ]
    return next((local_dir / name for name in names if (local_dir / name).exists()), None)


def _hub_records(part: HubPart, configuration: str | None, split: str) -> Iterator[Record | Rejected]:
    """Rows of one configuration, streamed. Raises DataError where it cannot be had."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            "reading data sets from the hub needs the extra 'hub': pip install 'llm-trainer[hub]'"
        ) from None
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # HTTPError is its client's, whose name changed

    name = f"{part.name}, {configuration}" if configuration else part.name
    try:
        for index, row in enumerate(_stream(part, configuration, split)):
            yield Record(row, name, f"{name}, {split} row {index}")
    except (OSError, ValueError, RuntimeError, HTTPError, datasets.exceptions.DatasetsError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{name} could not be loaded from the hub ({first})") from None


def _stream(part: HubPart, configuration: str | None, split: str) -> Iterable[Mapping[str, object]]:
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


def hub_file_url(part: HubPart, file: str) -> str:
    """The address of one file of a repository, which every builder of `datasets` reads."""
    return f"hf://datasets/{part.name}{f'@{part.revision}' if part.revision else ''}/{file}"
