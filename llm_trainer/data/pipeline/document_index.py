"""Stage 1, `read`: what one unit of the corpus holds, as a table of its documents; the texts themselves are
not kept.

A unit gives the same documents each time it is read, and cleaning is a pure function, so every later stage
makes the text again where it needs it, and keeps of each document only what is here: a hash of its cleaned
text, its size, whether it is kept, and which split it says it is for. Row n is the n-th document of the unit,
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

from llm_trainer.data.cleaning.cleaner import Cleaning
from llm_trainer.data.deduplication.minhash import BandWriter, MinHasher
from llm_trainer.data.pipeline.stage_cache import Advance, damaged, key_of, read_facts, write_facts
from llm_trainer.data.sources.base import Piece, Rejected, Unit
from llm_trainer.errors import DataError

SPLITS = ("train", "validation", "test")
NO_SPLIT = 255  # a document that says no split
EXAMPLES = 5
TABLE_FILE, BANDS_FILE, REJECTED_FILE = "table.npy", "bands.keys", "rejected.jsonl.gz"
TABLE = np.dtype([("hash", "<u8", (2,)), ("size", "<u8"), ("kept", "u1"), ("split", "u1")])


@dataclass(frozen=True)
class ReadTask:
    """Read, clean and judge one unit; with `min_hasher` the keys of each kept document's bands are written as
    well.
    """

    unit: Unit
    cleaning: Cleaning
    min_hasher: MinHasher | None
    with_alphabet: bool
    with_rejected: bool

    @property
    def name(self) -> str:
        """The unit's."""
        return self.unit.name

    @property
    def size(self) -> int:
        """The unit's bytes."""
        return self.unit.size

    def key(self, content_hash: str) -> str:
        """The key of the result, given the unit's content hash."""
        signatures = None if self.min_hasher is None else self.min_hasher.key
        return key_of(
            "read", content_hash, self.cleaning.key, signatures, self.with_alphabet, self.with_rejected
        )

    def run(self, folder: Path, advance: Advance) -> None:
        """Write the table, the facts, and what else is asked for."""
        rows, alphabet = _Rows(), set[str]()
        with contextlib.ExitStack() as stack:
            rejected = stack.enter_context(
                contextlib.closing(_Rejections(folder if self.with_rejected else None))
            )
            bands = (
                stack.enter_context(BandWriter(folder / BANDS_FILE, self.min_hasher))
                if self.min_hasher is not None
                else None
            )
            for reading in self.cleaning.apply(self.unit.pieces(), where=f"{self.name}, "):
                if isinstance(reading, Rejected):
                    rows.reject()
                    rejected.add(reading)
                    continue
                advance(rows.add(reading))
                if bands is not None:
                    bands.add(reading.text, reading.is_last)
                if self.with_alphabet:
                    alphabet.update(reading.text)
        rows.write(folder)
        reasons: dict[str, JsonValue] = dict(sorted(rejected.reasons.items()))
        examples: list[JsonValue] = list(rejected.examples)
        write_facts(
            folder, {"rejected": reasons, "examples": examples, "alphabet": "".join(sorted(alphabet))}
        )


class _Rows:
    """The table's columns, as they grow."""

    def __init__(self) -> None:
        self._hashes, self._sizes, self._kept, self._splits = (
            bytearray(),
            array("Q"),
            bytearray(),
            bytearray(),
        )
        self._digest, self._size = hashlib.blake2b(digest_size=16), 0

    def add(self, piece: Piece) -> int:
        """Count a piece of the document at hand; returns its bytes."""
        raw = piece.text.encode("utf-8")
        self._digest.update(raw)
        self._size += len(raw)
        if piece.is_last:
            self._row(
                self._digest.digest(),
                self._size,
                1,
                NO_SPLIT if piece.split is None else SPLITS.index(piece.split),
            )
        return len(raw)

    def reject(self) -> None:
        """A document that was rejected."""
        self._row(bytes(16), 0, 0, NO_SPLIT)

    def write(self, folder: Path) -> None:
        """The whole table."""
        table = np.zeros(len(self._kept), dtype=TABLE)
        table["hash"] = np.frombuffer(self._hashes, dtype="<u8").reshape(-1, 2)
        table["size"] = np.frombuffer(self._sizes, dtype=np.uint64)
        table["kept"] = np.frombuffer(self._kept, dtype=np.uint8)
        table["split"] = np.frombuffer(self._splits, dtype=np.uint8)
        np.save(folder / TABLE_FILE, table, allow_pickle=False)

    def _row(self, digest: bytes, size: int, kept: int, split: int) -> None:
        self._hashes += digest
        self._sizes.append(size)
        self._kept.append(kept)
        self._splits.append(split)
        self._digest, self._size = hashlib.blake2b(digest_size=16), 0


@dataclass
class _Rejections:
    """Counts rejected documents, remembers a few, and writes all of them where a folder is given."""

    folder: Path | None
    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    _file: IO[bytes] | None = None

    def add(self, rejected: Rejected) -> None:
        self.reasons[rejected.reason] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{rejected.where}: {rejected.reason}")
        if self.folder is not None:
            self._file = self._file or open_rejected(self.folder)
            write_rejected(self._file, rejected)

    def close(self) -> None:
        """End the file."""
        if self._file is not None:
            self._file.close()


def open_rejected(folder: Path) -> IO[bytes]:
    """The file of rejected documents of one result, for writing; the same contents give the same bytes."""
    return gzip.GzipFile(folder / REJECTED_FILE, "wb", compresslevel=6, mtime=0)  # type: ignore[return-value]


def write_rejected(file: IO[bytes], rejected: Rejected) -> None:
    """One rejected document as a line of JSON; the text is null where it could not be read."""
    record = {"reason": rejected.reason, "where": rejected.where, "text": rejected.text}
    file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")


@dataclass(frozen=True)
class UnitTable:
    """What stage 1 found in one unit."""

    unit: Unit
    key: str
    folder: Path

    def rows(self) -> np.ndarray:
        """The table, `(documents,)` of `TABLE`, memory-mapped."""
        try:
            table: np.ndarray = np.load(self.folder / TABLE_FILE, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise damaged(self.folder, error) from None
        return table

    def rejected(self) -> Counter[str]:
        """Documents rejected, by reason."""
        found = read_facts(self.folder)["rejected"]
        assert isinstance(found, dict)
        return Counter({reason: count for reason, count in found.items() if isinstance(count, int)})

    def examples(self) -> list[str]:
        """A few of them, in words."""
        found = read_facts(self.folder)["examples"]
        assert isinstance(found, list)
        return [str(example) for example in found]

    def alphabet(self) -> str:
        """The characters that occur, where they were asked for."""
        return str(read_facts(self.folder)["alphabet"])


def read_again(unit: Unit, cleaning: Cleaning, is_wanted: bytes | bytearray) -> Iterator[tuple[int, Piece]]:
    """(row, piece) of the documents whose row is wanted: their text once more, cleaned, not judged.

    Raises DataError where the unit does not hold what it held when its table was made.
    """
    rows = [row for row, wanted in enumerate(is_wanted) if wanted]

    def wanted_pieces() -> Iterator[Piece]:
        row = 0
        for reading in unit.pieces():
            if row == len(is_wanted):
                raise changed(unit)
            if isinstance(reading, Rejected):
                row += 1
                continue
            if is_wanted[row]:
                yield reading
            row += reading.is_last
        if row != len(is_wanted):
            raise changed(unit)

    place = 0
    for reading in cleaning.apply(wanted_pieces(), judge=False):
        if isinstance(reading, Rejected):
            raise changed(unit)
        yield rows[place], reading
        place += reading.is_last


def changed(unit: Unit) -> DataError:
    """The error for a unit that changed under our hands."""
    return DataError(f"{unit.name} changed while it was being prepared; run again when nobody writes to it")
