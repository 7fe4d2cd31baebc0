"""Documents from a column of a parquet or arrow file, a few megabytes of it at a time.

Texts are taken as bytes and decoded one by one, so that a row that is not utf-8 is set aside and the rows
around it are kept. In a damaged parquet file the rest of a row group is given up and the next one is read; an
arrow file is given up from the damage on. A data page of parquet and a record batch of arrow are held whole,
as those formats want it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

from llm_trainer.data.sources import file_io as storage
from llm_trainer.data.sources.base import Rejected, SourceItem, text_chunks
from llm_trainer.data.sources.file_io import FileRange
from llm_trainer.errors import DataError

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

_BATCH_BYTES = 4 * 2**20
_MOST_ROWS = 10_000
_ARROW_FILE = b"ARROW1"  # the magic of the random access format; without it, a stream


def read_parquet_column(extent: FileRange, column: str) -> Iterator[SourceItem]:
    """The texts of a column; the extent counts row groups."""
    try:
        with _opened_parquet(extent) as table:
            names = table.schema_arrow.names
            if column not in names:
                yield _no_column(extent, column, names)
                return
            row = 0
            for group in range(min(table.num_row_groups, extent.stop or table.num_row_groups)):
                rows = table.metadata.row_group(group).num_rows
                if group >= extent.start:
                    yield from _row_group(table, group, rows, row, column, extent)
                row += rows
    except _damage(extent) as error:
        yield Rejected("unreadable file", f"{extent.name}: {_first_line(error)}")


def _row_group(
    table: ParquetFile, group: int, rows: int, first_row: int, column: str, extent: FileRange
) -> Iterator[SourceItem]:
    done = 0
    try:
        for batch in _row_group_batches(table, group, column):
            yield from read_text_column(batch.column(0), column, f"{extent.name}, row", first_row + done)
            done += batch.num_rows
    except _damage(extent) as error:
        yield Rejected(
            "unreadable rows",
            f"{extent.name}, rows {first_row + done} to {first_row + rows - 1}: {_first_line(error)}",
        )


def _row_group_batches(table: ParquetFile, group: int, column: str) -> Iterator[pyarrow.RecordBatch]:
    """The column a few megabytes at a time, so that a row group of any size takes no more memory than that
    and a page.
    """
    facts = table.metadata.row_group(group)
    row_bytes = facts.total_byte_size / max(1, facts.num_rows)
    at_once = int(max(1, min(_MOST_ROWS, _BATCH_BYTES / max(1.0, row_bytes))))
    yield from table.iter_batches(at_once, row_groups=[group], columns=[column], use_threads=False)


def read_arrow_column(extent: FileRange, column: str) -> Iterator[SourceItem]:
    """The texts of a column; the extent counts record batches."""
    number = extent.start
    try:
        for number, batch in _batches(extent):
            if column not in batch.schema.names:
                yield _no_column(extent, column, batch.schema.names)
                return
            yield from read_text_column(
                batch.column(column), column, f"{extent.name}, batch {number}, row", 0
            )
    except _damage(extent) as error:
        yield Rejected("unreadable rows", f"{extent.name}, from batch {number}: {_first_line(error)}")


def split_parquet(extent: FileRange, size: int, most: int) -> list[tuple[int, int, int]]:
    """(first row group, the one after the last, bytes) of parts of about `most` stored bytes; empty where the
    file is damaged.
    """
    try:
        with _opened_parquet(extent) as table:
            sizes = [table.metadata.row_group(group).total_byte_size for group in range(table.num_row_groups)]
    except _damage(extent):
        return []
    return _parts(sizes, size, most)


def split_arrow(extent: FileRange, size: int, most: int) -> list[tuple[int, int, int]]:
    """(first batch, the one after the last, bytes) of parts of about `most` stored bytes; empty where the
    file is damaged.
    """
    try:
        sizes = [_stored_size(batch) for _, batch in _batches(extent)]
    except _damage(extent):
        return []
    return _parts(sizes, size, most)


def hash_parquet(extent: FileRange, column: str) -> bytes:
    """sha256 of the texts of a part, and of the damage in it."""
    digest = hashlib.sha256()
    try:
        with _opened_parquet(extent) as table:
            if column in table.schema_arrow.names:
                for group in range(
                    extent.start, min(table.num_row_groups, extent.stop or table.num_row_groups)
                ):
                    _hash_row_group(table, group, column, digest, extent)
    except _damage(extent):
        digest.update(b"unreadable file")
    return digest.digest()


def _hash_row_group(
    table: ParquetFile, group: int, column: str, digest: hashlib._Hash, extent: FileRange
) -> None:
    try:
        for batch in _row_group_batches(table, group, column):
            hash_text_column(batch.column(0), digest)
    except _damage(extent):
        digest.update(b"unreadable rows")


def hash_arrow(extent: FileRange, column: str) -> bytes:
    """sha256 of the texts of a part, and of the damage in it."""
    digest = hashlib.sha256()
    try:
        for _, batch in _batches(extent):
            if column in batch.schema.names:
                hash_text_column(batch.column(column), digest)
    except _damage(extent):
        digest.update(b"unreadable rows")
    return digest.digest()


def hash_text_column(column: pyarrow.Array, digest: hashlib._Hash) -> None:
    """Add every text of a column to a hash. Raises ArrowInvalid where the column is damaged."""
    for text in text_buffers(column):
        digest.update(b"\0no text\0" if text is None else b"\0%d\0" % text.size)
        digest.update(text or b"")


def text_buffers(column: pyarrow.Array) -> Iterator[pyarrow.Buffer | None]:
    """Each value's bytes, not copied; None for what is no text. Raises ArrowInvalid where the column's
    offsets are damaged.
    """
    import pyarrow as pa

    kind = pa.types
    if kind.is_dictionary(column.type):
        column.validate(full=True)
        column = column.dictionary_decode()
    if kind.is_string(column.type) or kind.is_large_string(column.type):
        column = column.view(pa.binary() if kind.is_string(column.type) else pa.large_binary())
    elif kind.is_string_view(column.type):
        column.validate(full=True)
        column = column.cast(pa.large_binary())
    elif not (kind.is_binary(column.type) or kind.is_large_binary(column.type)):
        yield from (None for _ in range(len(column)))
        return
    column.validate(full=True)
    for value in column:
        yield value.as_buffer()


def read_text_column(column: pyarrow.Array, name: str, where: str, first: int) -> Iterator[SourceItem]:
    """Documents of a column called `name`; `where` and the row's number from `first` on name each."""
    for row, raw in enumerate(text_buffers(column), first):
        if raw is None:
            yield Rejected(f"no text in the column {name!r}", f"{where} {row}")
        elif raw.size > storage.MAX_RECORD_BYTES:
            yield Rejected(f"record longer than {storage.LONGEST_RECORD >> 20} MB", f"{where} {row}")
        else:
            try:
                yield from text_chunks(str(raw, "utf-8"), f"{where} {row}")
            except UnicodeDecodeError as error:
                yield Rejected("not utf-8", f"{where} {row}, byte {error.start}")


def _batches(extent: FileRange) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
    """(number, batch) of each in the extent. The file is mapped, so that passing over batches costs nothing,
    and unmapped at the end.
    """
    pa = _pyarrow(extent)
    with extent.open_raw() as stored:
        is_file = stored.read(len(_ARROW_FILE)) == _ARROW_FILE
    with pa.memory_map(str(extent.path)) as mapped:
        if is_file:
            with pa.ipc.open_file(mapped) as table:
                for number in range(
                    extent.start, min(table.num_record_batches, extent.stop or table.num_record_batches)
                ):
                    yield number, table.get_batch(number)
            return
        with pa.ipc.open_stream(mapped) as stream:
            for number, batch in enumerate(stream):
                if extent.stop is not None and number >= extent.stop:
                    return
                if number >= extent.start:
                    yield number, batch


@contextlib.contextmanager
def _opened_parquet(extent: FileRange) -> Iterator[ParquetFile]:
    """The file, whose pages are read in small steps."""
    _pyarrow(extent)
    import pyarrow.parquet as pq

    with (
        extent.open_raw() as stored,
        pq.ParquetFile(stored, buffer_size=storage.BLOCK_BYTES, page_checksum_verification=True) as table,
    ):
        yield table


def _stored_size(batch: pyarrow.RecordBatch) -> int:
    """Bytes of a batch's buffers. (`nbytes` looks into offsets that nobody has checked yet: a garbled file
    would end the process.)
    """
    return sum(buffer.size for column in batch.columns for buffer in column.buffers() if buffer is not None)


def _parts(sizes: list[int], size: int, most: int) -> list[tuple[int, int, int]]:
    """Neighbouring items together up to about `most` bytes, sizes being scaled so that they add up to `size`."""
    scale = size / max(1, sum(sizes))
    parts: list[tuple[int, int, int]] = []
    first, held = 0, 0.0
    for number, one in enumerate(sizes):
        held += one * scale
        if held >= most or number == len(sizes) - 1:
            parts.append((first, number + 1, int(held)))
            first, held = number + 1, 0.0
    return parts


def _no_column(extent: FileRange, column: str, names: list[str]) -> Rejected:
    return Rejected(f"no text in the column {column!r}", f"{extent.name}: it has {', '.join(names)[:200]}")


def _pyarrow(extent: FileRange) -> ModuleType:
    try:
        return importlib.import_module("pyarrow")
    except ImportError:
        raise DataError(
            f"reading {extent.name} needs the extra 'formats': pip install 'llm-trainer[formats]'"
        ) from None


def _damage(extent: FileRange) -> tuple[type[Exception], ...]:
    """What reading a damaged file raises; ValueError where the names of columns are no text."""
    return (_pyarrow(extent).ArrowException, OSError, ValueError)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
