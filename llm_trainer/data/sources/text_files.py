"""Documents from plain text: a whole file, or each line of one.

Long files are read twice, once to see that all of it is utf-8, so that no document is half used.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator

from llm_trainer.data.sources import base as documents
from llm_trainer.data.sources import file_io as storage
from llm_trainer.data.sources.base import Rejected, SourceItem, rechunk, text_chunks
from llm_trainer.data.sources.file_io import FileRange
from llm_trainer.errors import DataError


def read_text_file(extent: FileRange) -> Iterator[SourceItem]:
    """The file as one document, in pieces where it is long."""
    with extent.open() as opened:
        head = opened.read(documents.CHUNK_BYTES)
        rest = opened.read(1)
    if not rest:
        try:
            yield from text_chunks(head.decode("utf-8-sig"), extent.name)
        except UnicodeDecodeError as error:
            yield encoding_rejection(extent, error.start, head)
        return
    rejected = _check_long(extent)
    if rejected is not None:
        yield rejected
    else:
        yield from rechunk(
            _decoded(
                extent, lambda offset: DataError(f"{extent.path} changed while it was read (byte {offset})")
            )
        )


def read_text_lines(extent: FileRange) -> Iterator[SourceItem]:
    """Each line that begins in the extent as a document."""
    for where, offset, line in storage.read_lines(extent):
        text = decode_line(where, offset, line)
        yield from [text] if isinstance(text, Rejected) else text_chunks(text, where)


def decode_line(where: str, offset: int, line: bytes | None) -> str | Rejected:
    """The text of a line as `storage.lines` gives it, or why there is none."""
    if line is None:
        return Rejected(f"line longer than {storage.LONGEST_RECORD >> 20} MB", where)
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        return Rejected("not utf-8", f"{where}, byte {offset + error.start}")


def encoding_rejection(extent: FileRange, offset: int, head: bytes) -> Rejected:
    """A file set aside for its encoding, with a hint where `head` shows which it is."""
    hint = "; it looks like utf-16, save it as utf-8" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
    return Rejected("not utf-8", f"{extent.name}, byte {offset}{hint}")


def _check_long(extent: FileRange) -> Rejected | None:
    """Why a long file cannot be used, or None; stops at the first reason."""
    first_wrong: list[int] = []

    def remember(offset: int) -> DataError:
        first_wrong.append(offset)
        return DataError("not utf-8")

    is_blank = True
    try:
        for block in _decoded(extent, remember):
            if "\0" in block:
                return Rejected("contains NUL", extent.name)
            is_blank = is_blank and block.isspace()
    except DataError:
        with extent.open() as opened:
            return encoding_rejection(extent, first_wrong[0], opened.read(4))
    return Rejected("empty", extent.name) if is_blank else None


def _decoded(extent: FileRange, wrong: Callable[[int], DataError]) -> Iterator[str]:
    """The file's text block by block; raises `wrong(byte offset)` where it is not utf-8."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    read = 0
    with extent.open() as opened:
        while True:
            block = opened.read(storage.BLOCK_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise wrong(read - pending + error.start) from None
            read += len(block)
            if text:
                yield text
            if not block:
                return
