"""What readers give: pieces of documents and rejected ones, in units that any number of workers may share.

A reader yields `TextChunk`s of text and `Rejected` documents, so that documents in = documents kept + documents
rejected, each with its reason. A document of ordinary size is one piece; a longer one comes in pieces of
about `CHUNK_BYTES`, cut where a letter is followed by a space: there byte-level BPE has a boundary of words
in any case, so the ids are those of the whole text.

A source is a sequence of *units*: a byte range of a file of lines, some small files, row groups of a table. A
unit is a small, frozen, picklable value that gives the same documents each time it is read, in whichever
process; a document never spans two. So what depends on a unit alone can be computed by any worker, kept, and
found again, while the texts themselves are never stored twice.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

CHUNK_BYTES = 4 * 2**20
_CUT = re.compile(r"[^\W\d_](?= )")


@dataclass(frozen=True, slots=True)
class TextChunk:
    """Text of a document; the document ends with the piece that `is_last`. `split` is set where the source
    itself has splits.
    """

    text: str
    is_last: bool = True
    split: str | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """A document that was left out: for which reason (a few fixed words, counted), where, and its text where
    that could be read.
    """

    reason: str
    where: str
    text: str | None = None


SourceItem: TypeAlias = "Piece | Rejected"


class Partition(Protocol):
    """Some documents of a source, always the same ones in the same order. Picklable, and small."""

    @property
    def name(self) -> str:
        """What messages call it: relative to its source, and no other unit of that source has it."""

    @property
    def size(self) -> int:
        """About how many bytes of storage are read for it."""

    def content_hash(self) -> str:
        """Changes with its bytes and with how they are read; paths and dates do not matter."""

    def read_chunks(self) -> Iterator[SourceItem]:
        """Its documents."""


class Source(Protocol):
    """Where documents come from."""

    @property
    def name(self) -> str:
        """What messages and metadata.json call it."""

    def partitions(self) -> Sequence[Partition]:
        """Its units, in a fixed order, which together are all its documents."""

    def read_chunks(self) -> Iterator[SourceItem]:
        """Every document of every unit, in order. May be called again and gives the same each time."""

    def content_hash(self) -> str:
        """Changes with any change of the documents or their order; paths and dates do not matter."""

    def size(self) -> int | None:
        """Bytes of text, for a progress bar; None where only reading would tell."""


def read_all(units: Iterable[Partition]) -> Iterator[SourceItem]:
    """Every document of these units, in order."""
    for unit in units:
        yield from unit.read_chunks()


def combined_hash(units: Iterable[Partition]) -> str:
    """sha256 over the units' own hashes, in order."""
    digest = hashlib.sha256()
    for unit in units:
        digest.update(f"{unit.content_hash()}\0".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class SplitPartition:
    """A unit whose documents all belong to one split of the source's own."""

    unit: Partition
    split: str

    @property
    def name(self) -> str:
        """The split, and the unit within it."""
        return f"{self.split}: {self.unit.name}"

    @property
    def size(self) -> int:
        """The unit's."""
        return self.unit.size

    def content_hash(self) -> str:
        """Of the unit and its split."""
        return hashlib.sha256(f"{self.split}\0{self.unit.content_hash()}".encode()).hexdigest()

    def read_chunks(self) -> Iterator[SourceItem]:
        """The unit's documents, marked with the split."""
        for reading in self.unit.read_chunks():
            yield replace(reading, split=self.split) if isinstance(reading, TextChunk) else reading


def rejection_reason(text: str) -> str | None:
    """Why a text cannot be used, or None."""
    if not text or text.isspace():
        return "empty"
    return "contains NUL" if "\0" in text else None


def text_chunks(text: str, where: str, split: str | None = None) -> Iterator[SourceItem]:
    """One text already in memory: as pieces, or rejected."""
    reason = rejection_reason(text)
    if reason:
        yield Rejected(reason, where, text)
    elif len(text) <= CHUNK_BYTES:
        yield TextChunk(text, True, split)
    else:
        yield from rechunk(iter([text]), split)


def rechunk(blocks: Iterator[str], split: str | None = None) -> Iterator[TextChunk]:
    """Join `blocks` of one document into pieces of about PIECE_BYTES characters, cut where words end; the
    last one says so.
    """
    held = ""
    for block in blocks:
        held += block
        while len(held) > CHUNK_BYTES:
            cut = _cut_before(held, CHUNK_BYTES)
            yield TextChunk(held[:cut], False, split)
            held = held[cut:]
    yield TextChunk(held, True, split)


def _cut_before(text: str, limit: int) -> int:
    """The last place up to `limit`, and in the text's second half, where a letter stands before a space; else
    `limit`.
    """
    ends = [match.end() for match in _CUT.finditer(text, max(limit - 65536, limit // 2), limit)]
    return ends[-1] if ends else limit
