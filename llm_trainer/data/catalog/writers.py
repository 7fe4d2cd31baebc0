"""Documents into files: parquet (a column `text`), jsonl (an object with a `text` a line) or txt (a document
a line).

A line of txt cannot hold a line break, so breaks within a document become spaces there, and that is counted;
the other two keep everything. Files hold about `SHARD_BYTES` of text each.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from llm_trainer.data.progress import ByteProgress
from llm_trainer.data.sources import file_io as storage
from llm_trainer.data.sources.base import Rejected, SourceItem
from llm_trainer.errors import DataError

SaveFormat: TypeAlias = Literal["parquet", "jsonl", "txt"]
SHARD_BYTES = 256 * 2**20
_ROW_GROUP_BYTES = 16 * 2**20
_EXAMPLES = 5


@dataclass
class SaveSummary:
    """What became of the documents: in = kept + rejected."""

    kept: int = 0
    size: int = 0  # of their text, in bytes of utf-8
    broken_lines: int = 0  # documents whose line breaks became spaces
    rejected: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def reject(self, rejected: Rejected) -> None:
        """Count a document that is left out."""
        self.rejected[rejected.reason] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{rejected.where}: {rejected.reason}")


class DocumentWriter(Protocol):
    """A file that takes documents."""

    def write(self, text: str) -> None:
        """Add one."""

    def close(self) -> None:
        """Finish the file."""


def save_documents(
    readings: Iterable[SourceItem], folder: Path, save_format: SaveFormat, progress: ByteProgress
) -> SaveSummary:
    """Write every document into files `train-00000.<format>` and so on in the folder, which is there and
    empty.
    """
    saved = SaveSummary()
    writer: DocumentWriter | None = None
    held = 0
    try:
        for text in join_chunks(readings):
            if isinstance(text, Rejected):
                saved.reject(text)
                continue
            if writer is None or held >= SHARD_BYTES:
                if writer is not None:
                    writer.close()
                saved.files.append(f"train-{len(saved.files):05d}.{save_format}")
                writer, held = open_writer(folder / saved.files[-1], save_format), 0
            if save_format == "txt" and len(lines := text.splitlines()) > 1:
                text, saved.broken_lines = " ".join(lines), saved.broken_lines + 1
            writer.write(text)
            size = len(text) if text.isascii() else len(text.encode("utf-8"))
            held, saved.size, saved.kept = held + size, saved.size + size, saved.kept + 1
            progress.advance(size)
    finally:
        if writer is not None:
            writer.close()
    return saved


def join_chunks(readings: Iterable[SourceItem]) -> Iterator[str | Rejected]:
    """Documents in one piece each; one that is longer than a record may be is rejected, since it could not be
    read again.
    """
    pieces: list[str] = []
    size = 0
    for reading in readings:
        if isinstance(reading, Rejected):
            yield reading
            continue
        size += len(reading.text.encode("utf-8"))
        pieces = [*pieces, reading.text] if size <= storage.MAX_RECORD_BYTES else []
        if reading.is_last:
            longest = storage.MAX_RECORD_BYTES >> 20
            yield (
                "".join(pieces)
                if pieces
                else Rejected(f"document longer than {longest} MB", f"a document of {size / 1e6:.0f} MB")
            )
            pieces, size = [], 0


def open_writer(file: Path, save_format: SaveFormat) -> DocumentWriter:
    """A writer for one file. Raises DataError where parquet is wanted and pyarrow is not installed."""
    return _Parquet(file) if save_format == "parquet" else _Lines(file, as_json=save_format == "jsonl")


class _Lines:
    def __init__(self, file: Path, as_json: bool) -> None:
        self._opened = file.open("w", encoding="utf-8", newline="\n")
        self._as_json = as_json

    def write(self, text: str) -> None:
        self._opened.write((json.dumps({"text": text}, ensure_ascii=False) if self._as_json else text) + "\n")

    def close(self) -> None:
        self._opened.close()


class _Parquet:
    """Row groups of some megabytes, so that a reader needs little memory and workers can share the file."""

    def __init__(self, file: Path) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise DataError(
                "parquet needs the extra 'formats': pip install 'llm-trainer[formats]', or give --save-format jsonl"
            ) from None
        self._schema = pa.schema([("text", pa.large_string())])
        self._to_table = pa.Table.from_pydict
        self._writer = pq.ParquetWriter(file, self._schema, compression="zstd", write_page_checksum=True)
        self._texts: list[str] = []
        self._held = 0

    def write(self, text: str) -> None:
        self._texts.append(text)
        self._held += len(text)
        if self._held >= _ROW_GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        if self._texts:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        self._writer.write_table(self._to_table({"text": self._texts}, schema=self._schema))
        self._texts, self._held = [], 0
