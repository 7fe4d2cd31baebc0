"""Documents and records from JSON: one record per line, or one value that is a record or a list of records.

A long list is never entirely in memory. A scan that knows only strings and brackets finds where each
element ends, and each element is parsed alone. So one element that is broken, too long or not utf-8 is
rejected, and the others are read.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, NamedTuple

from pydantic import JsonValue

from llm_trainer.data.sources import file_io
from llm_trainer.data.sources.base import Record, Rejected, SourceItem, text_chunks
from llm_trainer.data.sources.file_io import FileRange
from llm_trainer.data.sources.text_files import decode_line, encoding_rejection

# An entire string, or one structural character.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{},]', re.DOTALL)
# The rest of a string up to its end, or to the end of the block.
_IN_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+("|\\\Z|\Z)', re.DOTALL)
_BLANK = b" \t\r\n"
_HEAD_BYTES = 2**16
# What a value is called in messages; anything else is null.
_KINDS = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}


class _Value(NamedTuple):
    """One JSON value that should be a document or record, and its position for messages."""

    value: JsonValue
    where: str


def read_json_lines_column(file_range: FileRange, column: str) -> Iterator[SourceItem]:
    """Yield the text of each line that begins in the range.

    A line is a text, a record with a text in `column`, or a list of these; blank lines are skipped.

    Args:
        file_range: The file, or a byte range of it.
        column: The field that has the text.
    """
    return _column_texts(_json_lines(file_range), column)


def read_json_column(file_range: FileRange, column: str) -> Iterator[SourceItem]:
    """Yield the texts of a .json file.

    The file is one value (a text, a record or a list of these), or has one record per line.

    Args:
        file_range: The entire file.
        column: The field that has the text.
    """
    return _column_texts(_json_values(file_range), column)


def read_json_lines_records(file_range: FileRange) -> Iterator[Record | Rejected]:
    """Yield the record of each line that begins in the range, with all its fields."""
    return _records(_json_lines(file_range), file_range.name)


def read_json_records(file_range: FileRange) -> Iterator[Record | Rejected]:
    """Yield the records of a .json file, with all their fields: one value, or one record per line."""
    return _records(_json_values(file_range), file_range.name)


def _column_texts(values: Iterator[_Value | Rejected], column: str) -> Iterator[SourceItem]:
    for item in values:
        if isinstance(item, Rejected):
            yield item
            continue
        found = item.value.get(column) if isinstance(item.value, dict) else item.value
        if not isinstance(found, str):
            yield Rejected(
                f"no text in the column {column!r}", f"{item.where}: {_describe_columns(item.value)}"
            )
            continue
        try:
            found.encode("utf-8")
        except UnicodeEncodeError:  # a lone surrogate such as \ud800, which JSON can express
            yield Rejected("not utf-8", item.where)
            continue
        yield from text_chunks(found, item.where)


def _describe_columns(value: object) -> str:
    """What a record without usable text has instead, for its message."""
    if not isinstance(value, dict):
        return f"it is {_KINDS.get(type(value), 'null')}"
    columns = [
        name if isinstance(found, str) else f"{name} ({_KINDS.get(type(found), 'null')})"
        for name, found in value.items()
    ]
    return f"it has {', '.join(columns)[:200] or 'no columns'}"


def _records(values: Iterator[_Value | Rejected], part: str) -> Iterator[Record | Rejected]:
    for item in values:
        if isinstance(item, Rejected):
            yield item
        elif isinstance(item.value, dict):
            yield Record(item.value, part, item.where)
        else:
            yield Rejected("not a record", item.where)


def _json_lines(file_range: FileRange) -> Iterator[_Value | Rejected]:
    for where, offset, line in file_io.read_lines(file_range):
        if line is not None and not line.strip():
            continue
        text = decode_line(where, offset, line)
        yield from [text] if isinstance(text, Rejected) else _parsed(text, where)


def _json_values(file_range: FileRange) -> Iterator[_Value | Rejected]:
    """The values of a file that is one value, or one value per line if its first line alone is valid JSON."""
    with file_range.open() as opened:
        head = opened.read(_HEAD_BYTES)
        if head.removeprefix(codecs.BOM_UTF8).lstrip(_BLANK).startswith(b"["):
            yield from _list_elements(opened, head, file_range)
            return
        raw = head if b"\n" in head else head + opened.readline(file_io.MAX_RECORD_BYTES)
        line, _, more = raw.removeprefix(codecs.BOM_UTF8).lstrip(_BLANK).partition(b"\n")
        more += opened.read(_HEAD_BYTES)
        if more.strip() and _is_json(line):
            yield from _json_lines(file_range)
            return
        raw = line + b"\n" + more + opened.read(file_io.MAX_RECORD_BYTES)
    if len(raw) > file_io.MAX_RECORD_BYTES:
        yield Rejected(f"record longer than {file_io.MAX_RECORD_BYTES >> 20} MB", file_range.name)
        return
    try:
        yield from _parsed(raw.decode("utf-8-sig"), file_range.name)
    except UnicodeDecodeError as error:
        yield encoding_rejection(file_range, error.start, raw)


def _list_elements(opened: IO[bytes], head: bytes, file_range: FileRange) -> Iterator[_Value | Rejected]:
    for index, (offset, raw) in enumerate(_ElementScanner(opened, head).elements()):
        where = f"{file_range.name}, record {index}"
        if raw is None:
            yield Rejected(f"record longer than {file_io.MAX_RECORD_BYTES >> 20} MB", where)
            continue
        text = decode_line(where, offset, raw)
        yield from [text] if isinstance(text, Rejected) else _parsed(text, where, expand_list=False)


class _ElementScanner:
    """Finds the elements of a list in a stream block by block, with one element in memory at a time."""

    def __init__(self, opened: IO[bytes], head: bytes) -> None:
        self._opened, self._block = opened, head
        # Positions in the block: the end of what is scanned, and the start of the current element.
        self._position = self._begin = head.index(b"[") + 1
        self._depth, self._in_string, self._is_too_long = 1, False, False
        self._offset = 0  # of the block in the file
        self._pending: list[bytes] = []  # the current element's part in earlier blocks
        self._size = 0

    def elements(self) -> Iterator[tuple[int, bytes | None]]:
        """Yield (byte offset, element), with None for an element longer than MAX_RECORD_BYTES.

        A truncated end, and whatever follows the list, come as one more element.
        """
        while self._block:
            while (end := self._next_end()) is not None:
                yield from self._finish_element(end)
                self._begin = end + 1
            self._keep_up_to(len(self._block))
            self._offset += len(self._block)
            self._block = self._opened.read(file_io.BLOCK_BYTES)
            self._position, self._begin = int(self._in_string and self._position < 0), 0
        yield from self._finish_element(0)

    def _next_end(self) -> int | None:
        """Where the element ends in this block, or None once the block is scanned.

        `_position` is -1 if the block ends between a backslash and the character that it escapes.
        """
        while self._depth and 0 <= self._position < len(self._block):
            match = (_IN_STRING.match if self._in_string else _TOKEN.search)(self._block, self._position)
            if match is None:
                break
            self._position = match.end()
            if self._in_string:
                self._in_string = match[1] != b'"'
                self._position = -1 if match[1] == b"\\" else self._position
            elif match[0] == b'"':
                self._in_string = True
            elif match[0] in (b"[", b"{"):
                self._depth += 1
            elif match[0] in (b"]", b"}"):
                self._depth -= 1
            if not self._in_string and (self._depth == 0 or (self._depth == 1 and match[0] == b",")):
                return match.start()
        return None

    def _keep_up_to(self, end: int) -> None:
        self._size += end - self._begin
        self._is_too_long = self._is_too_long or self._size > file_io.MAX_RECORD_BYTES
        self._pending = [] if self._is_too_long else [*self._pending, self._block[self._begin : end]]

    def _finish_element(self, end: int) -> Iterator[tuple[int, bytes | None]]:
        self._keep_up_to(end)
        raw = b"".join(self._pending)
        if self._is_too_long or raw.strip(_BLANK):
            yield self._offset + end - self._size, None if self._is_too_long else raw
        self._pending, self._size, self._is_too_long = [], 0, False


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(text: str, where: str, *, expand_list: bool = True) -> Iterator[_Value | Rejected]:
    """One JSON value, or with `expand_list` each element of a list."""
    try:
        value: JsonValue = json.loads(text)
    except (ValueError, RecursionError):
        yield Rejected("not JSON", where, text)
        return
    if not (expand_list and isinstance(value, list)):
        yield _Value(value, where)
        return
    for index, element in enumerate(value):
        yield _Value(element, f"{where}, record {index}")
