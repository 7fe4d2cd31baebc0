"""Documents from files: text, lines, JSON, each plain or gzipped, in a file or a folder, read in a fixed order with flat memory.

A reader yields `Piece`s of text and `Rejected` documents, so that documents in = documents kept + documents rejected, each with its reason.
A document of ordinary size is one piece; a longer one comes in pieces of about `PIECE_BYTES`, cut where a letter is followed by a
space: there byte-level BPE has a boundary of words in any case, so the ids are those of the whole text. Long files are read twice, once to
see that all of it is utf-8, so that no document is half used.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, TypeAlias

from llm_trainer.config.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst", ".text")
RECORD_SUFFIXES = (".jsonl", ".json", ".ndjson")
PIECE_BYTES = 4 * 2**20
LONGEST_RECORD = 64 * 2**20
_BLOCK = 2**20
_CUT = re.compile(r"[^\W\d_](?= )")
_UNREADABLE = (OSError, EOFError, zlib.error)


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of a document; the document ends with the piece that `is_last`. `split` is set where the source itself has splits."""

    text: str
    is_last: bool = True
    split: str | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """A document that was left out: for which reason (a few fixed words, counted), and where."""

    reason: str
    where: str


Reading: TypeAlias = "Piece | Rejected"


class Source(Protocol):
    """Where documents come from. `pieces()` may be called again and gives the same each time."""

    @property
    def name(self) -> str:
        """What messages and metadata.json call it."""

    def pieces(self) -> Iterator[Reading]:
        """Every document, in a fixed order."""

    def content_hash(self) -> str:
        """Changes with any change of the documents or their order; paths and dates do not matter."""

    def size(self) -> int | None:
        """Bytes to read, for a progress bar; None where unknown."""


@dataclass(frozen=True)
class FileSource:
    """A file, or every file of a known kind in a folder (by relative path, hidden ones and `excluded` left out)."""

    path: Path
    text_column: str = "text"
    one_document_a_line: bool = False
    excluded: Path | None = None

    @property
    def name(self) -> str:
        """The file's or folder's own name."""
        return self.path.resolve().name

    def files(self) -> list[Path]:
        """The files to read; raises DataError where the path is missing or holds none of a known kind."""
        if self.path.is_file():
            return [self.path]
        if not self.path.is_dir():
            raise DataError(f"the input {self.path} does not exist; give a text file or a folder of them")
        found, other = [], set()
        for folder, folders, names in os.walk(self.path):
            place = Path(folder)
            folders[:] = sorted(name for name in folders if not name.startswith(".") and not self._is_excluded(place / name))
            for name in names:
                if name.startswith("."):
                    continue
                file = place / name
                if _kind(file) is None:
                    other.add("".join(file.suffixes) or name)
                else:
                    found.append(file)
        if not found:
            seen = f" (it holds {', '.join(sorted(other)[:8])})" if other else ""
            kinds = ", ".join((*TEXT_SUFFIXES, *RECORD_SUFFIXES))
            raise DataError(f"no text in the folder {self.path}{seen}; files of these kinds are read: {kinds}, each also with .gz")
        return sorted(found, key=lambda file: file.relative_to(self.path).as_posix())

    def pieces(self) -> Iterator[Reading]:
        """Every document of every file."""
        for file in self.files():
            kind = _kind(file) or "text"
            try:
                if kind == "jsonl":
                    yield from _json_lines(file, self.text_column)
                elif kind == "json":
                    yield from _json_records(file, self.text_column)
                elif self.one_document_a_line:
                    yield from _text_lines(file)
                else:
                    yield from _whole_text(file)
            except _UNREADABLE as error:
                yield Rejected("unreadable file", f"{file}: {error}")

    def content_hash(self) -> str:
        """sha256 over how each file is read and what it holds, in reading order."""
        digest = hashlib.sha256(f"{self.text_column}\0{self.one_document_a_line}".encode())
        for file in self.files():
            digest.update(f"\0{_kind(file)}\0{file.suffix == '.gz'}\0".encode())
            try:
                with file.open("rb") as opened:
                    digest.update(hashlib.file_digest(opened, "sha256").digest())
            except OSError as error:
                raise DataError(f"{file} cannot be read: {error.strerror or error}") from None
        return digest.hexdigest()

    def size(self) -> int | None:
        """Bytes of all files, None with compressed ones among them."""
        files = self.files()
        return None if any(file.suffix == ".gz" for file in files) else sum(file.stat().st_size for file in files)

    def _is_excluded(self, folder: Path) -> bool:
        return self.excluded is not None and folder.resolve() == self.excluded.resolve()


def usable(text: str) -> str | None:
    """Why a text cannot be used, or None."""
    if not text or text.isspace():
        return "empty"
    return "contains NUL" if "\0" in text else None


def judged(text: str, where: str, split: str | None = None) -> Iterator[Reading]:
    """One text already in memory: as pieces, or rejected."""
    reason = usable(text)
    if reason:
        yield Rejected(reason, where)
    else:
        yield from in_pieces(iter([text]), split)


def in_pieces(blocks: Iterator[str], split: str | None = None) -> Iterator[Piece]:
    """Join `blocks` of one document into pieces of about PIECE_BYTES characters, cut where words end; the last one says so."""
    held = ""
    for block in blocks:
        held += block
        while len(held) > PIECE_BYTES:
            cut = _cut_before(held, PIECE_BYTES)
            yield Piece(held[:cut], False, split)
            held = held[cut:]
    yield Piece(held, True, split)


def _cut_before(text: str, limit: int) -> int:
    """The last place up to `limit`, and in the text's second half, where a letter stands before a space; else `limit`."""
    ends = [match.end() for match in _CUT.finditer(text, max(limit - 65536, limit // 2), limit)]
    return ends[-1] if ends else limit


def _kind(file: Path) -> str | None:
    suffix = Path(file.stem).suffix if file.suffix == ".gz" else file.suffix
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    if suffix == ".json":
        return "json"
    return "text" if suffix.lower() in TEXT_SUFFIXES else None


def _open(file: Path) -> IO[bytes]:
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")  # type: ignore[return-value]


def _whole_text(file: Path) -> Iterator[Reading]:
    with _open(file) as opened:
        head = opened.read(PIECE_BYTES)
        rest = opened.read(1)
    if not rest:
        try:
            yield from judged(head.decode("utf-8-sig"), str(file))
        except UnicodeDecodeError as error:
            yield _not_utf8(file, error.start, head)
        return
    rejected = _check_long(file)
    if rejected is not None:
        yield rejected
    else:
        yield from in_pieces(_decoded(file, lambda offset: DataError(f"{file} changed while it was read (byte {offset})")))


def _check_long(file: Path) -> Rejected | None:
    """Why a long file cannot be used, or None; stops at the first reason."""
    first_wrong: list[int] = []

    def remember(offset: int) -> DataError:
        first_wrong.append(offset)
        return DataError("not utf-8")

    is_blank = True
    try:
        for block in _decoded(file, remember):
            if "\0" in block:
                return Rejected("contains NUL", str(file))
            is_blank = is_blank and block.isspace()
    except DataError:
        with _open(file) as opened:
            return _not_utf8(file, first_wrong[0], opened.read(4))
    return Rejected("empty", str(file)) if is_blank else None


def _decoded(file: Path, wrong: Callable[[int], DataError]) -> Iterator[str]:
    """The file's text block by block; raises `wrong(byte offset)` where it is not utf-8."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    read = 0
    with _open(file) as opened:
        while True:
            block = opened.read(_BLOCK)
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


def _not_utf8(file: Path, offset: int, head: bytes) -> Rejected:
    hint = "; it looks like utf-16, save it as utf-8" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
    return Rejected("not utf-8", f"{file}, byte {offset}{hint}")


def _lines(file: Path) -> Iterator[tuple[int, int, bytes | None]]:
    """(line number from 1, byte offset, line without its end), the line None where it is longer than LONGEST_RECORD."""
    offset, number = 0, 0
    with _open(file) as opened:
        while line := opened.readline(LONGEST_RECORD + 1):
            start, number = offset, number + 1
            offset += len(line)
            if len(line) > LONGEST_RECORD and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = opened.readline(_BLOCK)
                    offset += len(line)
                yield number, start, None
                continue
            line = line.removesuffix(b"\n").removesuffix(b"\r")
            skipped = len(codecs.BOM_UTF8) if start == 0 and line.startswith(codecs.BOM_UTF8) else 0
            yield number, start + skipped, line[skipped:]


def _text_lines(file: Path) -> Iterator[Reading]:
    for number, offset, line in _lines(file):
        text = _line_text(file, number, offset, line)
        yield from [text] if isinstance(text, Rejected) else judged(text, f"{file}, line {number}")


def _json_lines(file: Path, column: str) -> Iterator[Reading]:
    for number, offset, line in _lines(file):
        if line is not None and not line.strip():
            continue  # a blank line between records is no record
        text = _line_text(file, number, offset, line)
        yield from [text] if isinstance(text, Rejected) else _parsed(text, column, f"{file}, line {number}")


def _line_text(file: Path, number: int, offset: int, line: bytes | None) -> str | Rejected:
    if line is None:
        return Rejected(f"line longer than {LONGEST_RECORD >> 20} MB", f"{file}, line {number}")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        return Rejected("not utf-8", f"{file}, line {number}, byte {offset + error.start}")


def _json_records(file: Path, column: str) -> Iterator[Reading]:
    with _open(file) as opened:
        raw = opened.read(4 * LONGEST_RECORD + 1)
    if len(raw) > 4 * LONGEST_RECORD:
        yield Rejected(f".json longer than {4 * LONGEST_RECORD >> 20} MB", f"{file}: write it as .jsonl, one record a line")
        return
    try:
        yield from _parsed(raw.decode("utf-8-sig"), column, str(file))
    except UnicodeDecodeError as error:
        yield _not_utf8(file, error.start, raw)


def _parsed(text: str, column: str, where: str) -> Iterator[Reading]:
    """Documents of one JSON value: a text, a record with the text's column, or a list of these."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        yield Rejected("not JSON", where)
        return
    many = isinstance(value, list)
    for index, record in enumerate(value if many else [value]):
        place = f"{where}, record {index}" if many else where
        found = record.get(column) if isinstance(record, dict) else record
        if isinstance(found, str):
            try:
                found.encode("utf-8")
                yield from judged(found, place)
            except UnicodeEncodeError:  # \ud800 alone, which JSON can say
                yield Rejected("not utf-8", place)
        else:
            yield Rejected(f"no text in the column {column!r}", place)
