"""Stage 1, `read`: makes an index of the documents of each partition; the texts themselves are not kept.

A partition gives the same documents each time it is read, and cleaning is a pure function, so every later
stage makes the text again where it needs it. Of each document the index keeps a hash of its cleaned text, its
size, whether it is kept, and the split that its source assigns. Row n is the n-th document of the partition,
kept or rejected.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from pydantic import JsonValue

from llm_trainer.data.cleaning.cleaner import DocumentCleaner
from llm_trainer.data.deduplication.minhash import BandKeyWriter, MinHasher
from llm_trainer.data.pipeline.stage_cache import Advance, damaged_result, read_stats, stage_key, write_stats
from llm_trainer.data.sources.base import Partition, Rejected, TextChunk
from llm_trainer.errors import DataError

SPLITS = ("train", "validation", "test")
NO_SPLIT = 255  # the split of a document whose source does not assign one
MAX_EXAMPLES = 5
INDEX_FILE, BANDS_FILE, REJECTED_FILE = "table.npy", "bands.keys", "rejected.jsonl.gz"
INDEX_DTYPE = np.dtype([("hash", "<u8", (2,)), ("size", "<u8"), ("kept", "u1"), ("split", "u1")])


@dataclass(frozen=True)
class ReadTask:
    """Reads, cleans and filters one partition.

    Attributes:
        partition: What is read.
        cleaner: Cleans and filters its documents.
        min_hasher: If given, the MinHash band keys of each kept document are written as well.
        with_alphabet: Collect the characters that occur.
        with_rejected: Write rejected documents with their reasons.
    """

    partition: Partition
    cleaner: DocumentCleaner
    min_hasher: MinHasher | None
    with_alphabet: bool
    with_rejected: bool

    @property
    def name(self) -> str:
        """The partition's name."""
        return self.partition.name

    @property
    def size(self) -> int:
        """The partition's bytes."""
        return self.partition.size

    def key(self, content_hash: str) -> str:
        """The key of the result, given the partition's content hash."""
        signatures = None if self.min_hasher is None else self.min_hasher.key
        return stage_key(
            "read", content_hash, self.cleaner.key, signatures, self.with_alphabet, self.with_rejected
        )

    def run(self, folder: Path, advance: Advance) -> None:
        """Write the index, the stats, and the optional files into `folder`."""
        rows, alphabet = _IndexBuilder(), set[str]()
        with contextlib.ExitStack() as stack:
            rejected = stack.enter_context(
                contextlib.closing(_RejectionLog(folder if self.with_rejected else None))
            )
            bands = (
                stack.enter_context(BandKeyWriter(folder / BANDS_FILE, self.min_hasher))
                if self.min_hasher is not None
                else None
            )
            for item in self.cleaner.apply(self.partition.read_chunks(), where=f"{self.name}, "):
                if isinstance(item, Rejected):
                    rows.add_rejected()
                    rejected.add(item)
                    continue
                advance(rows.add(item))
                if bands is not None:
                    bands.add(item.text, item.is_last)
                if self.with_alphabet:
                    alphabet.update(item.text)
        rows.write(folder)
        reasons: dict[str, JsonValue] = dict(sorted(rejected.reasons.items()))
        examples: list[JsonValue] = list(rejected.examples)
        write_stats(
            folder, {"rejected": reasons, "examples": examples, "alphabet": "".join(sorted(alphabet))}
        )


class _IndexBuilder:
    """The columns of an index while documents are added."""

    def __init__(self) -> None:
        self._hashes, self._sizes, self._kept, self._splits = (
            bytearray(),
            array("Q"),
            bytearray(),
            bytearray(),
        )
        self._digest, self._size = hashlib.blake2b(digest_size=16), 0

    def add(self, chunk: TextChunk) -> int:
        """Add a chunk of the current document; returns its bytes."""
        raw = chunk.text.encode("utf-8")
        self._digest.update(raw)
        self._size += len(raw)
        if chunk.is_last:
            split = NO_SPLIT if chunk.split is None else SPLITS.index(chunk.split)
            self._add_row(self._digest.digest(), self._size, 1, split)
        return len(raw)

    def add_rejected(self) -> None:
        """Add a rejected document."""
        self._add_row(bytes(16), 0, 0, NO_SPLIT)

    def write(self, folder: Path) -> None:
        """Write the index."""
        rows = np.zeros(len(self._kept), dtype=INDEX_DTYPE)
        rows["hash"] = np.frombuffer(self._hashes, dtype="<u8").reshape(-1, 2)
        rows["size"] = np.frombuffer(self._sizes, dtype=np.uint64)
        rows["kept"] = np.frombuffer(self._kept, dtype=np.uint8)
        rows["split"] = np.frombuffer(self._splits, dtype=np.uint8)
        np.save(folder / INDEX_FILE, rows, allow_pickle=False)

    def _add_row(self, digest: bytes, size: int, kept: int, split: int) -> None:
        self._hashes += digest
        self._sizes.append(size)
        self._kept.append(kept)
        self._splits.append(split)
        self._digest, self._size = hashlib.blake2b(digest_size=16), 0


@dataclass
class _RejectionLog:
    """Counts rejected documents, keeps a few examples, and writes all of them if a folder is given."""

    folder: Path | None
    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    _file: IO[bytes] | None = None

    def add(self, rejected: Rejected) -> None:
        self.reasons[rejected.reason] += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(f"{rejected.where}: {rejected.reason}")
        if self.folder is not None:
            self._file = self._file or open_rejected(self.folder)
            write_rejected(self._file, rejected)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def open_rejected(folder: Path) -> IO[bytes]:
    """Open the file of rejected documents of one result for writing; equal contents give equal bytes."""
    return gzip.GzipFile(folder / REJECTED_FILE, "wb", compresslevel=6, mtime=0)  # type: ignore[return-value]


def write_rejected(file: IO[bytes], rejected: Rejected) -> None:
    """Write a rejected document as a line of JSON; its text is null if it could not be read."""
    record = {"reason": rejected.reason, "where": rejected.where, "text": rejected.text}
    file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")


@dataclass(frozen=True)
class DocumentIndex:
    """The result of stage 1 for one partition.

    Attributes:
        partition: What was read.
        key: The key of the result.
        folder: The folder of the result.
    """

    partition: Partition
    key: str
    folder: Path

    def rows(self) -> np.ndarray:
        """The documents, `(documents,)` of `INDEX_DTYPE`, memory-mapped."""
        try:
            rows: np.ndarray = np.load(self.folder / INDEX_FILE, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise damaged_result(self.folder, error) from None
        return rows

    def rejected(self) -> Counter[str]:
        """Reason → number of rejected documents."""
        found = read_stats(self.folder)["rejected"]
        assert isinstance(found, dict)
        return Counter({reason: count for reason, count in found.items() if isinstance(count, int)})

    def examples(self) -> list[str]:
        """A few rejected documents, with their reasons."""
        found = read_stats(self.folder)["examples"]
        assert isinstance(found, list)
        return [str(example) for example in found]

    def alphabet(self) -> str:
        """The characters that occur; empty if they were not collected."""
        return str(read_stats(self.folder)["alphabet"])


def reread_documents(
    partition: Partition, cleaner: DocumentCleaner, is_wanted: bytes | bytearray
) -> Iterator[tuple[int, TextChunk]]:
    """Read the wanted documents of a partition again, cleaned but not filtered.

    Args:
        partition: What is read.
        cleaner: The cleaner that the index was made with.
        is_wanted: One byte per row of the index, not 0 for the documents to read.

    Yields:
        The row of each document, and its chunks.

    Raises:
        DataError: The partition has changed since its index was made.
    """
    rows = [row for row, wanted in enumerate(is_wanted) if wanted]

    def wanted_chunks() -> Iterator[TextChunk]:
        row = 0
        for item in partition.read_chunks():
            if row == len(is_wanted):
                raise partition_changed(partition)
            if isinstance(item, Rejected):
                row += 1
                continue
            if is_wanted[row]:
                yield item
            row += item.is_last
        if row != len(is_wanted):
            raise partition_changed(partition)

    number = 0
    for item in cleaner.apply(wanted_chunks(), apply_filters=False):
        if isinstance(item, Rejected):
            raise partition_changed(partition)
        yield rows[number], item
        number += item.is_last


def partition_changed(partition: Partition) -> DataError:
    """The error for a partition that changes while it is prepared."""
    return DataError(
        f"{partition.name} changed while it was being prepared;"
        " run the command again when no other program writes to it"
    )
