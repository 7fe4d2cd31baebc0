"""Documents and records from parquet and arrow files, a few megabytes at a time.

Texts are taken as bytes and decoded one by one, so that a row that is not utf-8 is rejected and the rows
around it are kept. In a damaged parquet file the rest of the row group is rejected and the next one is read;
an arrow file is rejected from the damage on. One data page of parquet and one record batch of arrow are in
memory at a time, as those formats require.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from llm_trainer.data.optional_deps import missing_extra
from llm_trainer.data.sources import file_io
from llm_trainer.data.sources.base import Record, Rejected, SourceItem, text_chunks
from llm_trainer.data.sources.file_io import FileRange
from llm_trainer.errors import DataError

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

_Item = TypeVar("_Item")
_BATCH_BYTES = 4 * 2**20
_MAX_ROWS = 10_000
_ARROW_FILE = b"ARROW1"  # the magic bytes of the random access format; a file without them is a stream


def read_parquet_column(file_range: FileRange, column: str) -> Iterator[SourceItem]:
    """Yield the texts of one column of a parquet file.

    Args:
        file_range: The file; `start` and `stop` count row groups.
        column: The column to read.
    """

    def read_batch(batch: pyarrow.RecordBatch, first_row: int) -> Iterator[SourceItem]:
        return read_text_column(batch.column(0), column, f"{file_range.name}, row", first_row)

    return _read_parquet(file_range, column, read_batch)


def read_parquet_records(file_range: FileRange) -> Iterator[Record | Rejected]:
    """Yield the rows of a parquet file, with all their columns."""

    def read_batch(batch: pyarrow.RecordBatch, first_row: int) -> Iterator[Record | Rejected]:
        return _batch_records(batch, file_range, f"{file_range.name}, row", first_row)

    return _read_parquet(file_range, None, read_batch)


def read_arrow_column(file_range: FileRange, column: str) -> Iterator[SourceItem]:
    """Yield the texts of one column of an arrow file.

    Args:
        file_range: The file; `start` and `stop` count record batches.
        column: The column to read.
    """

    def read_batch(batch: pyarrow.RecordBatch, number: int) -> Iterator[SourceItem]:
        return read_text_column(batch.column(column), column, f"{file_range.name}, batch {number}, row", 0)

    return _read_arrow(file_range, column, read_batch)


def read_arrow_records(file_range: FileRange) -> Iterator[Record | Rejected]:
    """Yield the rows of an arrow file, with all their columns."""

    def read_batch(batch: pyarrow.RecordBatch, number: int) -> Iterator[Record | Rejected]:
        return _batch_records(batch, file_range, f"{file_range.name}, batch {number}, row", 0)

    return _read_arrow(file_range, None, read_batch)


def _read_parquet(
    file_range: FileRange,
    column: str | None,
    read_batch: Callable[[pyarrow.RecordBatch, int], Iterator[_Item]],
) -> Iterator[_Item | Rejected]:
    """What `read_batch(batch, first row)` yields for each batch with this column, or with all of them."""
    try:
        with _open_parquet(file_range) as table:
            names = table.schema_arrow.names
            if column is not None and column not in names:
                yield _no_column(file_range, column, names)
                return
            row = 0
            for group in range(min(table.num_row_groups, file_range.stop or table.num_row_groups)):
                if group >= file_range.start:
                    yield from _read_row_group(table, group, row, column, read_batch, file_range)
                row += table.metadata.row_group(group).num_rows
    except _damage_errors(file_range) as error:
        yield Rejected("unreadable file", f"{file_range.name}: {_first_line(error)}")


def _read_row_group(
    table: ParquetFile,
    group: int,
    first_row: int,
    column: str | None,
    read_batch: Callable[[pyarrow.RecordBatch, int], Iterator[_Item]],
    file_range: FileRange,
) -> Iterator[_Item | Rejected]:
    row, end = first_row, first_row + table.metadata.row_group(group).num_rows
    try:
        for batch in _row_group_batches(table, group, column):
            yield from read_batch(batch, row)
            row += batch.num_rows
    except _damage_errors(file_range) as error:
        yield Rejected("unreadable rows", f"{file_range.name}, rows {row} to {end - 1}: {_first_line(error)}")


def _row_group_batches(table: ParquetFile, group: int, column: str | None) -> Iterator[pyarrow.RecordBatch]:
    """The rows a few megabytes at a time, so that memory does not grow with the row group."""
    facts = table.metadata.row_group(group)
    row_bytes = facts.total_byte_size / max(1, facts.num_rows)
    rows_per_batch = int(max(1, min(_MAX_ROWS, _BATCH_BYTES / max(1.0, row_bytes))))
    columns = None if column is None else [column]
    yield from table.iter_batches(rows_per_batch, row_groups=[group], columns=columns, use_threads=False)


def _read_arrow(
    file_range: FileRange,
    column: str | None,
    read_batch: Callable[[pyarrow.RecordBatch, int], Iterator[_Item]],
) -> Iterator[_Item | Rejected]:
    """What `read_batch(batch, number)` yields for each record batch; `column` is one that each must have."""
    number = file_range.start
    try:
        for number, batch in _arrow_batches(file_range):
            if column is not None and column not in batch.schema.names:
                yield _no_column(file_range, column, batch.schema.names)
                return
            yield from read_batch(batch, number)
    except _damage_errors(file_range) as error:
        yield Rejected("unreadable rows", f"{file_range.name}, from batch {number}: {_first_line(error)}")


def split_parquet(file_range: FileRange, size: int, max_bytes: int) -> list[tuple[int, int, int]]:
    """Divide a parquet file into ranges of row groups.

    Args:
        file_range: The entire file.
        size: Its stored bytes.
        max_bytes: About how many stored bytes a range may have.

    Returns:
        (first row group, the one after the last, bytes) of each range; empty if the file is damaged.
    """
    try:
        with _open_parquet(file_range) as table:
            sizes = [table.metadata.row_group(group).total_byte_size for group in range(table.num_row_groups)]
    except _damage_errors(file_range):
        return []
    return _group_neighbours(sizes, size, max_bytes)


def split_arrow(file_range: FileRange, size: int, max_bytes: int) -> list[tuple[int, int, int]]:
    """Divide an arrow file into ranges of record batches, as `split_parquet` does into row groups."""
    try:
        sizes = [_stored_size(batch) for _, batch in _arrow_batches(file_range)]
    except _damage_errors(file_range):
        return []
    return _group_neighbours(sizes, size, max_bytes)


def hash_parquet(file_range: FileRange, column: str) -> bytes:
    """Return the sha256 of one column's texts in a range, and of the damage in it."""
    digest = hashlib.sha256()
    try:
        with _open_parquet(file_range) as table:
            if column in table.schema_arrow.names:
                for group in range(
                    file_range.start, min(table.num_row_groups, file_range.stop or table.num_row_groups)
                ):
                    _hash_row_group(table, group, column, digest, file_range)
    except _damage_errors(file_range):
        digest.update(b"unreadable file")
    return digest.digest()


def _hash_row_group(
    table: ParquetFile, group: int, column: str, digest: hashlib._Hash, file_range: FileRange
) -> None:
    try:
        for batch in _row_group_batches(table, group, column):
            hash_text_column(batch.column(0), digest)
    except _damage_errors(file_range):
        digest.update(b"unreadable rows")


def hash_arrow(file_range: FileRange, column: str) -> bytes:
    """Return the sha256 of one column's texts in a range, and of the damage in it."""
    digest = hashlib.sha256()
    try:
        for _, batch in _arrow_batches(file_range):
            if column in batch.schema.names:
                hash_text_column(batch.column(column), digest)
    except _damage_errors(file_range):
        digest.update(b"unreadable rows")
    return digest.digest()


def hash_text_column(column: pyarrow.Array, digest: hashlib._Hash) -> None:
    """Add every text of a column to a hash. Raises ArrowInvalid if the column is damaged."""
    for text in text_buffers(column):
        digest.update(b"\0no text\0" if text is None else b"\0%d\0" % text.size)
        digest.update(text or b"")


def text_buffers(column: pyarrow.Array) -> Iterator[pyarrow.Buffer | None]:
    """Yield each value's bytes without copying them; None for a value that is not a text.

    Raises:
        pyarrow.ArrowInvalid: The column's offsets are damaged.
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


def read_text_column(column: pyarrow.Array, name: str, where: str, first_row: int) -> Iterator[SourceItem]:
    """Yield the documents of a column.

    Args:
        column: The values.
        name: The column's name, for messages.
        where: What precedes the row's number in messages.
        first_row: The number of the first row.
    """
    for row, raw in enumerate(text_buffers(column), first_row):
        if raw is None:
            yield Rejected(f"no text in the column {name!r}", f"{where} {row}")
        elif raw.size > file_io.MAX_RECORD_BYTES:
            yield Rejected(f"record longer than {file_io.MAX_RECORD_BYTES >> 20} MB", f"{where} {row}")
        else:
            try:
                yield from text_chunks(str(raw, "utf-8"), f"{where} {row}")
            except UnicodeDecodeError as error:
                yield Rejected("not utf-8", f"{where} {row}, byte {error.start}")


def _batch_records(
    batch: pyarrow.RecordBatch, file_range: FileRange, where: str, first_row: int
) -> Iterator[Record | Rejected]:
    """The rows of a batch as records; if one is damaged or not utf-8, the rows are read one by one."""
    rows = _as_dicts(batch, file_range)
    for index in range(batch.num_rows):
        found = rows[index : index + 1] if rows else _as_dicts(batch.slice(index, 1), file_range)
        row = f"{where} {first_row + index}"
        yield Record(found[0], file_range.name, row) if found else Rejected("unreadable rows", row)


def _as_dicts(batch: pyarrow.RecordBatch, file_range: FileRange) -> list[Mapping[str, object]]:
    """The rows as Python values; none if a value is damaged or a string is not utf-8."""
    try:
        batch.validate(full=True)
        rows: list[Mapping[str, object]] = batch.to_pylist()
    except _damage_errors(file_range):
        return []
    return rows


def _arrow_batches(file_range: FileRange) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
    """(number, batch) of each in the range; the file is memory-mapped, so that skipping costs nothing."""
    pa = _pyarrow(file_range)
    with file_range.open_raw() as raw:
        is_file = raw.read(len(_ARROW_FILE)) == _ARROW_FILE
    with pa.memory_map(str(file_range.path)) as mapped:
        if is_file:
            with pa.ipc.open_file(mapped) as table:
                for number in range(
                    file_range.start,
                    min(table.num_record_batches, file_range.stop or table.num_record_batches),
                ):
                    yield number, table.get_batch(number)
            return
        with pa.ipc.open_stream(mapped) as stream:
            for number, batch in enumerate(stream):
                if file_range.stop is not None and number >= file_range.stop:
                    return
                if number >= file_range.start:
                    yield number, batch


@contextlib.contextmanager
def _open_parquet(file_range: FileRange) -> Iterator[ParquetFile]:
    """The file, whose pages are read in small steps."""
    _pyarrow(file_range)
    import pyarrow.parquet as pq

    with (
        file_range.open_raw() as raw,
        pq.ParquetFile(raw, buffer_size=file_io.BLOCK_BYTES, page_checksum_verification=True) as table,
    ):
        yield table


def _stored_size(batch: pyarrow.RecordBatch) -> int:
    """Bytes of a batch's buffers.

    (`nbytes` reads offsets that are not validated yet; with a damaged file it would crash the process.)
    """
    return sum(buffer.size for column in batch.columns for buffer in column.buffers() if buffer is not None)


def _group_neighbours(sizes: list[int], size: int, max_bytes: int) -> list[tuple[int, int, int]]:
    """(first, the one after the last, bytes) of neighbouring items grouped up to about `max_bytes`.

    The items' sizes are scaled so that they add up to `size`.
    """
    scale = size / max(1, sum(sizes))
    groups: list[tuple[int, int, int]] = []
    first, group_bytes = 0, 0.0
    for number, one in enumerate(sizes):
        group_bytes += one * scale
        if group_bytes >= max_bytes or number == len(sizes) - 1:
            groups.append((first, number + 1, int(group_bytes)))
            first, group_bytes = number + 1, 0.0
    return groups


def _no_column(file_range: FileRange, column: str, names: list[str]) -> Rejected:
    return Rejected(
        f"no text in the column {column!r}", f"{file_range.name}: it has {', '.join(names)[:200]}"
    )


def _pyarrow(file_range: FileRange) -> ModuleType:
    try:
        return importlib.import_module("pyarrow")
    except ImportError:
        raise DataError(missing_extra(f"reading {file_range.name}", "formats")) from None


def _damage_errors(file_range: FileRange) -> tuple[type[Exception], ...]:
    """What reading a damaged file raises; ValueError if the names of columns are not utf-8."""
    return (_pyarrow(file_range).ArrowException, OSError, ValueError)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
