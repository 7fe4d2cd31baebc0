"""What every source yields: text chunks and rejected documents, from partitions read in parallel.

A source yields a `TextChunk` for text and a `Rejected` for each document that cannot be used, so that
documents read = documents kept + documents rejected, each with its reason. A document of ordinary size is one
chunk. A longer one comes in chunks of about `CHUNK_BYTES`, which end where a letter is followed by a space:
byte-level BPE has a word boundary there in any case, so the token ids are those of the unsplit text.

A source is a sequence of *partitions*: a byte range of a file of lines, some small files, or row groups of a
table. A partition is a small, frozen, picklable value that yields the same documents each time it is read, in
any process, and a document never spans two of them. So whatever depends on one partition alone can be
computed by any worker, cached and found again, while the texts themselves are never stored twice.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

CHUNK_BYTES = 4 * 2**20
_WORD_END = re.compile(r"[^\W\d_](?= )")


@dataclass(frozen=True, slots=True)
class TextChunk:
    """A document, or the next part of a long one.

    Attributes:
        text: The text.
        is_last: Whether the document ends with this chunk.
        split: The split of the document, if the source itself has splits.
    """

    text: str
    is_last: bool = True
    split: str | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """A document that was rejected.

    Attributes:
        reason: One of a few fixed phrases, so that reasons can be counted.
        where: The file and position of the document.
        text: The document's text, if it could be read.
    """

    reason: str
    where: str
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a dataset, with all its fields.

    Attributes:
        fields: The values by field name.
        part: The file, or the name and configuration of the dataset on the hub.
        where: The position of the record, for messages.
    """

    fields: Mapping[str, object]
    part: str
    where: str


SourceItem: TypeAlias = "TextChunk | Rejected"


class Partition(Protocol):
    """A fixed run of documents of a source, always in the same order. Picklable, and small."""

    @property
    def name(self) -> str:
        """The name used in messages, relative to the source; unique within the source."""

    @property
    def size(self) -> int:
        """Approximate number of stored bytes that reading it takes."""

    def content_hash(self) -> str:
        """Hash the bytes and how they are read; paths and dates do not matter."""

    def read_chunks(self) -> Iterator[SourceItem]:
        """Yield its documents."""


class Source(Protocol):
    """Where documents come from."""

    @property
    def name(self) -> str:
        """The name used in messages and metadata.json."""

    def partitions(self) -> Sequence[Partition]:
        """Return its partitions in a fixed order; together they have every document."""

    def read_chunks(self) -> Iterator[SourceItem]:
        """Yield every document of every partition, in order and the same on each call."""

    def content_hash(self) -> str:
        """Hash the documents and their order; paths and dates do not matter."""

    def size(self) -> int | None:
        """Return the bytes of text for a progress bar; None if only reading could determine them."""


def read_all(partitions: Iterable[Partition]) -> Iterator[SourceItem]:
    """Yield every document of these partitions, in order."""
    for partition in partitions:
        yield from partition.read_chunks()


def combined_hash(partitions: Iterable[Partition]) -> str:
    """Return the sha256 over the partitions' own hashes, in order."""
    digest = hashlib.sha256()
    for partition in partitions:
        digest.update(f"{partition.content_hash()}\0".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class SplitPartition:
    """A partition whose documents all belong to one split that the source itself defines."""

    partition: Partition
    split: str

    @property
    def name(self) -> str:
        """The split, and the partition within it."""
        return f"{self.split}: {self.partition.name}"

    @property
    def size(self) -> int:
        """Approximate number of stored bytes."""
        return self.partition.size

    def content_hash(self) -> str:
        """Hash the partition's contents and its split."""
        return hashlib.sha256(f"{self.split}\0{self.partition.content_hash()}".encode()).hexdigest()

    def read_chunks(self) -> Iterator[SourceItem]:
        """Yield the partition's documents, labelled with the split."""
        for item in self.partition.read_chunks():
            yield replace(item, split=self.split) if isinstance(item, TextChunk) else item


def rejection_reason(text: str) -> str | None:
    """Return why a text cannot be used, or None."""
    if not text or text.isspace():
        return "empty"
    return "contains NUL" if "\0" in text else None


def text_chunks(text: str, where: str, split: str | None = None) -> Iterator[SourceItem]:
    """Yield one text that is already in memory: as chunks, or as one rejected document.

    Args:
        text: The document.
        where: Its position, for messages.
        split: Its split, if the source has splits.
    """
    reason = rejection_reason(text)
    if reason:
        yield Rejected(reason, where, text)
    elif len(text) <= CHUNK_BYTES:
        yield TextChunk(text, True, split)
    else:
        yield from rechunk(iter([text]), split)


def rechunk(blocks: Iterator[str], split: str | None = None) -> Iterator[TextChunk]:
    """Regroup the blocks of one document into chunks of about CHUNK_BYTES characters that end with a word.

    Args:
        blocks: The document's text, divided anywhere.
        split: The document's split.
    """
    pending = ""
    for block in blocks:
        pending += block
        while len(pending) > CHUNK_BYTES:
            end = _last_word_end(pending, CHUNK_BYTES)
            yield TextChunk(pending[:end], False, split)
            pending = pending[end:]
    yield TextChunk(pending, True, split)


def _last_word_end(text: str, limit: int) -> int:
    """The last position between a letter and a space up to `limit`, and not far before it; else `limit`."""
    ends = [match.end() for match in _WORD_END.finditer(text, max(limit - 65536, limit // 2), limit)]
    return ends[-1] if ends else limit
