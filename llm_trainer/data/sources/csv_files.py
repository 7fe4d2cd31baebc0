r"""Documents from a column of a table of text (RFC 4180): comma, semicolon, tab or bar between fields, quotes around those that need them.

The standard library's `csv` keeps one limit of a field's length for the whole process, and a lone quote makes it swallow the rest of a
file. Here a record that is not CSV costs its first line, and reading goes on with the next one.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from llm_trainer.data.sources import file_io as storage
from llm_trainer.data.sources.base import Rejected, SourceItem, text_chunks
from llm_trainer.data.sources.file_io import FileRange

_DELIMITERS = (b",", b";", b"\t", b"|")
_OPEN_QUOTE = re.compile(rb'"(?:[^"]++|"")*+\Z')
_Line = tuple[str, int, bytes | None]


class _NotCSVError(Exception):
    """A quote where none may be."""


class _OpenError(Exception):
    """The record goes on in the next line: a quoted field, begun at `at`, has no end yet."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at


@dataclass(frozen=True)
class _Record:
    where: str
    offset: int
    fields: list[bytes]


def read_csv_column(extent: FileRange, column: str) -> Iterator[SourceItem]:
    """The texts of a column that the first record names. The delimiter is the one that makes a column of that
    name.
    """
    header = _header(extent, column)
    if isinstance(header, Rejected):
        yield header
        return
    delimiter, names = header
    index = names.index(column)
    for number, record in enumerate(_records(extent, delimiter)):
        if isinstance(record, Rejected):
            yield record
        elif number == 0:
            continue
        elif len(record.fields) != len(names):
            yield Rejected(
                "not CSV", f"{record.where}: {len(record.fields)} fields, the header has {len(names)}"
            )
        else:
            try:
                yield from text_chunks(record.fields[index].decode("utf-8"), record.where)
            except UnicodeDecodeError:
                yield Rejected("not utf-8", f"{record.where}, byte {record.offset}")


def _header(extent: FileRange, column: str) -> tuple[bytes, list[str]] | Rejected:
    """(delimiter, names of the columns), or why the file cannot be read."""
    seen: list[str] = []
    for delimiter in _DELIMITERS:
        first = next(_records(extent, delimiter), None)
        if first is None:
            return Rejected("empty", extent.name)
        if isinstance(first, Rejected):
            seen = seen or [first.reason]
            continue
        names = [name.decode("utf-8", errors="replace").strip() for name in first.fields]
        if column in names:
            return delimiter, names
        seen = max(seen, names, key=len)
    return Rejected(
        f"no text in the column {column!r}", f"{extent.name}: its first record is {', '.join(seen)[:200]}"
    )


def _records(extent: FileRange, delimiter: bytes) -> Iterator[_Record | Rejected]:
    """Every record; blank lines are none."""
    field = re.compile(
        rb'(?:"((?:[^"]++|"")*+)"|([^%b"][^%b]*+|))(?:(%b)|\Z)' % ((re.escape(delimiter),) * 3)
    )
    lines = _Lines(storage.read_lines(extent, keep_line_ends=True))
    while (first := lines.first()) is not None:
        where, offset, line = first
        if line is None:
            yield Rejected(f"line longer than {storage.LONGEST_RECORD >> 20} MB", where)
        elif line.strip(b"\r\n"):
            fields = _fields(line, lines, field)
            yield Rejected("not CSV", where) if fields is None else _Record(where, offset, fields)


def _fields(line: bytes, lines: _Lines, field: re.Pattern[bytes]) -> list[bytes] | None:
    """The fields of the record that begins with `line`; None where it is not CSV, and then the lines after it
    are as if unread.
    """
    fields: list[bytes] = []
    at, record = 0, line
    try:
        while True:
            try:
                _parse(record, at, field, fields)
                return fields
            except _OpenError as still_open:
                at = still_open.at
                record += lines.up_to_odd_quote(storage.MAX_RECORD_BYTES - len(record))
    except _NotCSVError:
        lines.give_back()
        return None


def _parse(record: bytes, at: int, field: re.Pattern[bytes], fields: list[bytes]) -> None:
    """Append the fields from `at` on. Raises _OpenError, _NotCSVError."""
    record = record.removesuffix(b"\n").removesuffix(b"\r")
    while True:
        match = field.match(record, at)
        if match is None:
            raise _OpenError(at) if _OPEN_QUOTE.match(record, at) else _NotCSVError
        quoted = match[1]
        fields.append(match[2] if quoted is None else quoted.replace(b'""', b'"'))
        if match[3] is None:
            return
        at = match.end()


class _Lines:
    """Lines one after the other; those of a record that turns out to be none are given back."""

    def __init__(self, lines: Iterator[_Line]) -> None:
        self._lines = lines
        self._ahead: deque[_Line] = deque()
        self._taken: list[_Line] = []

    def first(self) -> _Line | None:
        """The next record's first line, None at the end."""
        self._taken = []
        return self._next()

    def up_to_odd_quote(self, most: int) -> bytes:
        """The next lines up to one with an odd number of quotes, where a quoted field may end. Raises _NotCSVError where none comes in
        `most` bytes.
        """
        found: list[bytes] = []
        while (line := self._next()) is not None:
            self._taken.append(line)
            if line[2] is None or (most := most - len(line[2])) < 0:
                break
            found.append(line[2])
            if line[2].count(b'"') % 2:
                return b"".join(found)
        raise _NotCSVError

    def give_back(self) -> None:
        """Everything since the first line will come again."""
        self._ahead.extendleft(reversed(self._taken))

    def _next(self) -> _Line | None:
        return self._ahead.popleft() if self._ahead else next(self._lines, None)
