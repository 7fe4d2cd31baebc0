"""Documents from plain text: an entire file, or each line of one.

A long file is read twice, the first time to check that all of it is utf-8, so that no document is used in
part.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator

from llm_trainer.data.sources import base, file_io
from llm_trainer.data.sources.base import Rejected, SourceItem, rechunk, text_chunks
from llm_trainer.data.sources.file_io import FileRange
from llm_trainer.errors import DataError


def read_text_file(file_range: FileRange) -> Iterator[SourceItem]:
    """Yield the file as one document, in chunks if it is long."""
    with file_range.open() as opened:
        head = opened.read(base.CHUNK_BYTES)
        rest = opened.read(1)
    if not rest:
        try:
            yield from text_chunks(head.decode("utf-8-sig"), file_range.name)
        except UnicodeDecodeError as error:
            yield encoding_rejection(file_range, error.start, head)
        return
    rejected = _check_long_file(file_range)
    if rejected is not None:
        yield rejected
    else:
        yield from rechunk(
            _decoded_blocks(
                file_range,
                lambda offset: DataError(
                    f"{file_range.path} changed while it was read (at byte {offset}); run the command again"
                ),
            )
        )


def read_text_lines(file_range: FileRange) -> Iterator[SourceItem]:
    """Yield each line that begins in the range as a document."""
    for where, offset, line in file_io.read_lines(file_range):
        text = decode_line(where, offset, line)
        yield from [text] if isinstance(text, Rejected) else text_chunks(text, where)


def decode_line(where: str, offset: int, line: bytes | None) -> str | Rejected:
    """Decode one item of `file_io.read_lines`; return the rejection if it is too long or not utf-8."""
    if line is None:
        return Rejected(f"line longer than {file_io.MAX_RECORD_BYTES >> 20} MB", where)
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        return Rejected("not utf-8", f"{where}, byte {offset + error.start}")


def encoding_rejection(file_range: FileRange, offset: int, head: bytes) -> Rejected:
    """Reject a file for its encoding.

    Args:
        file_range: The file.
        offset: The first byte that is not utf-8.
        head: The file's first bytes, which may show that it is utf-16.
    """
    hint = "; it looks like utf-16, save it as utf-8" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
    return Rejected("not utf-8", f"{file_range.name}, byte {offset}{hint}")


def _check_long_file(file_range: FileRange) -> Rejected | None:
    """Why a long file cannot be used, or None; reading stops at the first reason."""
    first_wrong: list[int] = []

    def remember(offset: int) -> DataError:
        first_wrong.append(offset)
        return DataError("not utf-8")

    is_blank = True
    try:
        for block in _decoded_blocks(file_range, remember):
            if "\0" in block:
                return Rejected("contains NUL", file_range.name)
            is_blank = is_blank and block.isspace()
    except DataError:
        with file_range.open() as opened:
            return encoding_rejection(file_range, first_wrong[0], opened.read(4))
    return Rejected("empty", file_range.name) if is_blank else None


def _decoded_blocks(file_range: FileRange, error_at: Callable[[int], DataError]) -> Iterator[str]:
    """The file's text block by block; raises `error_at(byte offset)` at the first byte that is not utf-8."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    read = 0
    with file_range.open() as opened:
        while True:
            block = opened.read(file_io.BLOCK_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise error_at(read - pending + error.start) from None
            read += len(block)
            if text:
                yield text
            if not block:
                return
