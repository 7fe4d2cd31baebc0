"""Documents from JSON: a record a line, or one value that is a record or a list of them.

A long list is never held whole: a scan that knows strings and brackets alone finds where each element ends,
and each is parsed by itself. So one element that is broken, too long or not utf-8 is set aside and the others
are read.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO

from pydantic import JsonValue

from llm_trainer.data.sources import file_io as storage
from llm_trainer.data.sources.base import Rejected, SourceItem, text_chunks
from llm_trainer.data.sources.file_io import FileRange
from llm_trainer.data.sources.text_files import decode_line, encoding_rejection

_TOKEN = re.compile(
    rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{},]', re.DOTALL
)  # a whole string, or one character that matters
_IN_STRING = re.compile(
    rb'[^"\\]*+(?:\\.[^"\\]*+)*+("|\\\Z|\Z)', re.DOTALL
)  # on to the string's end, or the block's
_BLANK = b" \t\r\n"
_HEAD = 2**16


def read_json_lines_column(extent: FileRange, column: str) -> Iterator[SourceItem]:
    """The record of each line that begins in the extent; blank lines between records are none."""
    for where, offset, line in storage.read_lines(extent):
        if line is not None and not line.strip():
            continue
        text = decode_line(where, offset, line)
        yield from [text] if isinstance(text, Rejected) else _parsed(text, column, where)


def read_json_column(extent: FileRange, column: str) -> Iterator[SourceItem]:
    """The records of a file that is one value, or, where its first line is one already, a record a line."""
    with extent.open() as opened:
        head = opened.read(_HEAD)
        if head.removeprefix(codecs.BOM_UTF8).lstrip(_BLANK).startswith(b"["):
            yield from _elements_read(opened, head, extent, column)
            return
        raw = head if b"\n" in head else head + opened.readline(storage.MAX_RECORD_BYTES)
        line, _, more = raw.removeprefix(codecs.BOM_UTF8).lstrip(_BLANK).partition(b"\n")
        more += opened.read(_HEAD)
        if more.strip() and _is_json(line):
            yield from read_json_lines_column(extent, column)
            return
        raw = line + b"\n" + more + opened.read(storage.MAX_RECORD_BYTES)
    if len(raw) > storage.MAX_RECORD_BYTES:
        yield Rejected(f"record longer than {storage.LONGEST_RECORD >> 20} MB", extent.name)
        return
    try:
        yield from _parsed(raw.decode("utf-8-sig"), column, extent.name)
    except UnicodeDecodeError as error:
        yield encoding_rejection(extent, error.start, raw)


def _elements_read(opened: IO[bytes], head: bytes, extent: FileRange, column: str) -> Iterator[SourceItem]:
    for index, (offset, raw) in enumerate(_Elements(opened, head).found()):
        where = f"{extent.name}, record {index}"
        if raw is None:
            yield Rejected(f"record longer than {storage.LONGEST_RECORD >> 20} MB", where)
            continue
        text = decode_line(where, offset, raw)
        yield from [text] if isinstance(text, Rejected) else _parsed(text, column, where, may_be_list=False)


class _Elements:
    """Finds the elements of a list in a stream block by block, holding one element at a time."""

    def __init__(self, opened: IO[bytes], head: bytes) -> None:
        self._opened, self._block = opened, head
        self._at = self._begin = (
            head.index(b"[") + 1
        )  # in the block: what is scanned, and what of it belongs to the element
        self._depth, self._in_string, self._is_too_long = 1, False, False
        self._offset = 0  # of the block in the file
        self._held: list[bytes] = []  # the element's part in blocks before
        self._size = 0

    def found(self) -> Iterator[tuple[int, bytes | None]]:
        """(byte offset, element), None for one longer than LONGEST_RECORD. A torn end, and what follows the
        list, come as one more.
        """
        while self._block:
            while (end := self._next_end()) is not None:
                yield from self._element(end)
                self._begin = end + 1
            self._hold(len(self._block))
            self._offset += len(self._block)
            self._block = self._opened.read(storage.BLOCK_BYTES)
            self._at, self._begin = int(self._in_string and self._at < 0), 0
        yield from self._element(0)

    def _next_end(self) -> int | None:
        """Where the element ends in this block, or None with the block scanned to its end; `_at` is -1 behind
        a torn escape.
        """
        while self._depth and 0 <= self._at < len(self._block):
            match = (_IN_STRING.match if self._in_string else _TOKEN.search)(self._block, self._at)
            if match is None:
                break
            self._at = match.end()
            if self._in_string:
                self._in_string = match[1] != b'"'
                self._at = -1 if match[1] == b"\\" else self._at
            elif match[0] == b'"':
                self._in_string = True
            elif match[0] in (b"[", b"{"):
                self._depth += 1
            elif match[0] in (b"]", b"}"):
                self._depth -= 1
            if not self._in_string and (self._depth == 0 or (self._depth == 1 and match[0] == b",")):
                return match.start()
        return None

    def _hold(self, end: int) -> None:
        self._size += end - self._begin
        self._is_too_long = self._is_too_long or self._size > storage.MAX_RECORD_BYTES
        self._held = [] if self._is_too_long else [*self._held, self._block[self._begin : end]]

    def _element(self, end: int) -> Iterator[tuple[int, bytes | None]]:
        self._hold(end)
        raw = b"".join(self._held)
        if self._is_too_long or raw.strip(_BLANK):
            yield self._offset + end - self._size, None if self._is_too_long else raw
        self._held, self._size, self._is_too_long = [], 0, False


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(text: str, column: str, where: str, *, may_be_list: bool = True) -> Iterator[SourceItem]:
    """Documents of one JSON value: a text, a record with the text's column, or a list of these."""
    try:
        value: JsonValue = json.loads(text)
    except (ValueError, RecursionError):
        yield Rejected("not JSON", where, text)
        return
    if not (may_be_list and isinstance(value, list)):
        yield from _of_record(value, column, where)
        return
    for index, record in enumerate(value):
        yield from _of_record(record, column, f"{where}, record {index}")


def _of_record(record: JsonValue, column: str, where: str) -> Iterator[SourceItem]:
    found = record.get(column) if isinstance(record, dict) else record
    if not isinstance(found, str):
        yield Rejected(f"no text in the column {column!r}", where)
        return
    try:
        found.encode("utf-8")
    except UnicodeEncodeError:  # \ud800 alone, which JSON can say
        yield Rejected("not utf-8", where)
        return
    yield from text_chunks(found, where)
