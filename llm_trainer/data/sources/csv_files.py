r"""Documents and records from CSV tables (RFC 4180).

Fields are separated by comma, semicolon, tab or vertical bar, and quoted where they need it. The standard
library's `csv` has one limit of a field's length for the entire process, and an unmatched quote makes it
consume the rest of a file. Here a record that is not CSV is rejected at its first line, and reading continues
with the next one.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from llm_trainer.data.sources import file_io
from llm_trainer.data.sources.base import Record, Rejected, SourceItem, text_chunks
from llm_trainer.data.sources.file_io import FileRange, format_suffix

_DELIMITERS = (b",", b";", b"\t", b"|")
_OPEN_QUOTE = re.compile(rb'"(?:[^"]++|"")*+\Z')
_Line = tuple[str, int, bytes | None]


class _NotCSVError(Exception):
    """A quote in a position where CSV does not allow one."""


class _OpenQuoteError(Exception):
    """The record continues in the next line: a quoted field that begins at `position` is not closed yet."""

    def __init__(self, position: int) -> None:
        super().__init__()
        self.position = position


@dataclass(frozen=True)
class _Row:
    where: str
    offset: int
    fields: list[bytes]


def read_csv_column(file_range: FileRange, column: str) -> Iterator[SourceItem]:
    """Yield the texts of one column.

    The delimiter is the one with which the first record has a column of that name.

    Args:
        file_range: The file; its first record names the columns.
        column: The column to read.
    """
    header = _find_column(file_range, column)
    if isinstance(header, Rejected):
        yield header
        return
    delimiter, names = header
    index = names.index(column)
    for row in _data_rows(file_range, delimiter, names):
        if isinstance(row, Rejected):
            yield row
            continue
        try:
            yield from text_chunks(row.fields[index].decode("utf-8"), row.where)
        except UnicodeDecodeError:
            yield Rejected("not utf-8", f"{row.where}, byte {row.offset}")


def read_csv_records(file_range: FileRange) -> Iterator[Record | Rejected]:
    """Yield every record with all its fields; the delimiter is a tab in a .tsv file, else a comma."""
    delimiter = b"\t" if format_suffix(file_range.path) == ".tsv" else b","
    first = next(_rows(file_range, delimiter), None)
    if first is None or isinstance(first, Rejected):
        yield first or Rejected("empty", file_range.name)
        return
    names = _column_names(first)
    for row in _data_rows(file_range, delimiter, names):
        if isinstance(row, Rejected):
            yield row
            continue
        try:
            values = [field.decode("utf-8") for field in row.fields]
        except UnicodeDecodeError:
            yield Rejected("not utf-8", f"{row.where}, byte {row.offset}")
        else:
            yield Record(dict(zip(names, values, strict=True)), file_range.name, row.where)


def _find_column(file_range: FileRange, column: str) -> tuple[bytes, list[str]] | Rejected:
    """(delimiter, names of the columns), or why the file cannot be read."""
    seen: list[str] = []
    for delimiter in _DELIMITERS:
        first = next(_rows(file_range, delimiter), None)
        if first is None:
            return Rejected("empty", file_range.name)
        if isinstance(first, Rejected):
            seen = seen or [first.reason]
            continue
        names = _column_names(first)
        if column in names:
            return delimiter, names
        seen = max(seen, names, key=len)
    return Rejected(
        f"no text in the column {column!r}",
        f"{file_range.name}: its first record is {', '.join(seen)[:200]}",
    )


def _column_names(header: _Row) -> list[str]:
    return [name.decode("utf-8", errors="replace").strip() for name in header.fields]


def _data_rows(file_range: FileRange, delimiter: bytes, names: list[str]) -> Iterator[_Row | Rejected]:
    """Every row after the header that has as many fields as the header, and what is rejected."""
    for number, row in enumerate(_rows(file_range, delimiter)):
        if isinstance(row, Rejected):
            yield row
        elif number == 0:
            continue
        elif len(row.fields) != len(names):
            yield Rejected("not CSV", f"{row.where}: {len(row.fields)} fields, the header has {len(names)}")
        else:
            yield row


def _rows(file_range: FileRange, delimiter: bytes) -> Iterator[_Row | Rejected]:
    """Every row, the header included; blank lines are skipped."""
    field = re.compile(
        rb'(?:"((?:[^"]++|"")*+)"|([^%b"][^%b]*+|))(?:(%b)|\Z)' % ((re.escape(delimiter),) * 3)
    )
    lines = _LineBuffer(file_io.read_lines(file_range, keep_line_ends=True))
    while (first := lines.next_record()) is not None:
        where, offset, line = first
        if line is None:
            yield Rejected(f"line longer than {file_io.MAX_RECORD_BYTES >> 20} MB", where)
        elif line.strip(b"\r\n"):
            fields = _fields(line, lines, field)
            yield Rejected("not CSV", where) if fields is None else _Row(where, offset, fields)


def _fields(line: bytes, lines: _LineBuffer, field: re.Pattern[bytes]) -> list[bytes] | None:
    """The fields of the record that begins with `line`.

    None if the record is not CSV; the lines after it are then read again as records of their own.
    """
    fields: list[bytes] = []
    position, record = 0, line
    try:
        while True:
            try:
                _parse(record, position, field, fields)
                return fields
            except _OpenQuoteError as still_open:
                position = still_open.position
                record += lines.up_to_odd_quote(file_io.MAX_RECORD_BYTES - len(record))
    except _NotCSVError:
        lines.push_back()
        return None


def _parse(record: bytes, position: int, field: re.Pattern[bytes], fields: list[bytes]) -> None:
    """Append the fields from `position` on. Raises _OpenQuoteError and _NotCSVError."""
    record = record.removesuffix(b"\n").removesuffix(b"\r")
    while True:
        match = field.match(record, position)
        if match is None:
            raise _OpenQuoteError(position) if _OPEN_QUOTE.match(record, position) else _NotCSVError
        quoted = match[1]
        fields.append(match[2] if quoted is None else quoted.replace(b'""', b'"'))
        if match[3] is None:
            return
        position = match.end()


class _LineBuffer:
    """Lines in order; the lines of a record that turns out not to be CSV can be pushed back."""

    def __init__(self, lines: Iterator[_Line]) -> None:
        self._lines = lines
        self._pushed_back: deque[_Line] = deque()
        self._taken: list[_Line] = []

    def next_record(self) -> _Line | None:
        """Return the first line of the next record, None at the end."""
        self._taken = []
        return self._next()

    def up_to_odd_quote(self, max_bytes: int) -> bytes:
        """Return the next lines up to one with an odd number of quotes, where a quoted field may end.

        Raises _NotCSVError if no such line comes within `max_bytes`.
        """
        found: list[bytes] = []
        while (line := self._next()) is not None:
            self._taken.append(line)
            if line[2] is None or (max_bytes := max_bytes - len(line[2])) < 0:
                break
            found.append(line[2])
            if line[2].count(b'"') % 2:
                return b"".join(found)
        raise _NotCSVError

    def push_back(self) -> None:
        """Make every line since the record's first one come again."""
        self._pushed_back.extendleft(reversed(self._taken))

    def _next(self) -> _Line | None:
        return self._pushed_back.popleft() if self._pushed_back else next(self._lines, None)
