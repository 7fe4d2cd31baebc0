"""Writes documents to files: parquet, jsonl or txt.

A parquet file has a column `text`, a jsonl file one `{"text": …}` per line, and a txt file one document per
line. A line of a txt file cannot contain a line break, so line breaks within a document become spaces there,
and such documents are counted; the other formats keep everything. Files have about `SHARD_BYTES` of text
each.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from llm_trainer.data.optional_deps import missing_extra
from llm_trainer.data.progress import ByteProgress
from llm_trainer.data.sources import file_io
from llm_trainer.data.sources.base import Rejected, SourceItem
from llm_trainer.errors import DataError

SaveFormat: TypeAlias = Literal["parquet", "jsonl", "txt"]
SHARD_BYTES = 256 * 2**20
_ROW_GROUP_BYTES = 16 * 2**20
_EXAMPLES = 5


@dataclass
class SaveSummary:
    """How many documents were written and rejected; documents read = kept + rejected.

    Attributes:
        kept: Documents written.
        size: Bytes of their text in utf-8.
        broken_lines: Documents whose line breaks became spaces.
        rejected: Rejected documents by reason.
        examples: The position and reason of the first rejected documents.
        files: The names of the files.
    """

    kept: int = 0
    size: int = 0
    broken_lines: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def reject(self, rejected: Rejected) -> None:
        """Count a rejected document."""
        self.rejected[rejected.reason] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{rejected.where}: {rejected.reason}")


class DocumentWriter(Protocol):
    """A file that documents are written to."""

    def write(self, text: str) -> None:
        """Append a document."""

    def close(self) -> None:
        """Complete the file."""


def save_documents(
    items: Iterable[SourceItem], folder: Path, save_format: SaveFormat, progress: ByteProgress
) -> SaveSummary:
    """Write every document to files `train-00000.<format>`, `train-00001.<format>` and so on.

    Args:
        items: Documents and rejected ones, from a source.
        folder: An existing, empty folder.
        save_format: The format of the files.
        progress: Advanced by the bytes of each document.
    """
    saved = SaveSummary()
    writer: DocumentWriter | None = None
    shard_bytes = 0
    try:
        for text in join_chunks(items):
            if isinstance(text, Rejected):
                saved.reject(text)
                continue
            if writer is None or shard_bytes >= SHARD_BYTES:
                if writer is not None:
                    writer.close()
                saved.files.append(f"train-{len(saved.files):05d}.{save_format}")
                writer, shard_bytes = open_writer(folder / saved.files[-1], save_format), 0
            if save_format == "txt" and len(lines := text.splitlines()) > 1:
                text, saved.broken_lines = " ".join(lines), saved.broken_lines + 1
            writer.write(text)
            size = len(text) if text.isascii() else len(text.encode("utf-8"))
            shard_bytes, saved.size, saved.kept = shard_bytes + size, saved.size + size, saved.kept + 1
            progress.advance(size)
    finally:
        if writer is not None:
            writer.close()
    return saved


def join_chunks(items: Iterable[SourceItem]) -> Iterator[str | Rejected]:
    """Join the chunks of each document.

    A document that is longer than a record may be is rejected, because it could not be read again.
    """
    chunks: list[str] = []
    size = 0
    for item in items:
        if isinstance(item, Rejected):
            yield item
            continue
        size += len(item.text.encode("utf-8"))
        chunks = [*chunks, item.text] if size <= file_io.MAX_RECORD_BYTES else []
        if item.is_last:
            longest = file_io.MAX_RECORD_BYTES >> 20
            yield (
                "".join(chunks)
                if chunks
                else Rejected(f"document longer than {longest} MB", f"a document of {size / 1e6:.0f} MB")
            )
            chunks, size = [], 0


def open_writer(file: Path, save_format: SaveFormat) -> DocumentWriter:
    """Create a file and return its writer. Raises DataError if parquet needs a package that is missing."""
    return (
        _ParquetWriter(file)
        if save_format == "parquet"
        else _LineWriter(file, as_json=save_format == "jsonl")
    )


class _LineWriter:
    def __init__(self, file: Path, as_json: bool) -> None:
        self._opened = file.open("w", encoding="utf-8", newline="\n")
        self._as_json = as_json

    def write(self, text: str) -> None:
        self._opened.write((json.dumps({"text": text}, ensure_ascii=False) if self._as_json else text) + "\n")

    def close(self) -> None:
        self._opened.close()


class _ParquetWriter:
    """Writes row groups of some megabytes, so that readers need little memory and can work in parallel."""

    def __init__(self, file: Path) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise DataError(
                missing_extra("writing parquet", "formats") + ", or give --save-format jsonl"
            ) from None
        self._schema = pa.schema([("text", pa.large_string())])
        self._to_table = pa.Table.from_pydict
        self._writer = pq.ParquetWriter(file, self._schema, compression="zstd", write_page_checksum=True)
        self._texts: list[str] = []
        self._buffered = 0

    def write(self, text: str) -> None:
        self._texts.append(text)
        self._buffered += len(text)
        if self._buffered >= _ROW_GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        if self._texts:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        self._writer.write_table(self._to_table({"text": self._texts}, schema=self._schema))
        self._texts, self._buffered = [], 0
