"""Stage 3, `split`: which document is for training, which for validation, which for testing.

By hash: a document's split is decided by the hash of its own text and the seed, so it stays where it is when
others come or go, and no order matters. Duplicates have been dropped before: with near-deduplication a
document's near-duplicates cannot be in another split. A split by hash needs enough documents for the shares
to come out; with few, or one, the text is cut in one place instead, the last part being held out, as nanoGPT
does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llm_trainer.config.schema.data import DataConfig
from llm_trainer.data.pipeline.document_index import NO_SPLIT, SPLITS
from llm_trainer.data.sources.base import Piece
from llm_trainer.errors import UsageError

LEFT_OUT = 255  # in a plan: a document that is rejected, or repeats another
BY_HASH = "by the hash of each document"
CONTIGUOUS = "contiguous: too few documents for hashes, so the last part is held out"
GIVEN = "as the source says"
_ENOUGH_HELD_OUT = 8  # documents to be expected in the smallest split, for a split by hash
_SPECIAL = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Shares:
    """Shares of the three splits; they add up to 1."""

    train: float
    validation: float
    test: float

    @classmethod
    def of(cls, config: DataConfig) -> Shares:
        """The shares that the settings mean. What they leave is for training, or for testing where
        train_ratio and no test_ratio is said.

        Raises UsageError where they do not add up to 1 or leave nothing for training.
        """
        validation, test = config.val_ratio, config.test_ratio
        train = config.train_ratio
        if train is None or (
            not config.is_said("train_ratio") and train + validation + test != 1.0
        ):  # a door's default gives way
            train = 1.0 - validation - test
        elif not config.is_said("test_ratio"):
            test = max(0.0, round(1.0 - train - validation, 9))
        if abs(train + validation + test - 1.0) > 1e-6 or train <= 0:
            said = f"train_ratio {train:g}, val_ratio {validation:g} and test_ratio {test:g}"
            raise UsageError(f"{said} must add up to 1 and leave a share for training")
        return cls(train, validation, test)

    def can_split_by_hash(self, documents: int) -> bool:
        """Whether so many documents are enough for every held-out share to come out about right."""
        held_out = [share for share in (self.validation, self.test) if share > 0]
        return not held_out or documents * min(held_out) >= _ENOUGH_HELD_OUT

    def by_hash(self, hashes: np.ndarray, seed: int) -> np.ndarray:
        """The split of each document by its content hash, uint8 `(documents,)`: places in `SPLITS`."""
        place = places(hashes, f"split {seed}")
        codes = np.zeros(len(hashes), dtype=np.uint8)
        codes[place < self.validation + self.test] = SPLITS.index("test")
        codes[place < self.validation] = SPLITS.index("validation")
        return codes

    def boundaries(self, size: int) -> tuple[int, int, int]:
        """Where a text of `size` is cut: training ends at the first, validation at the second, testing at
        `size`.
        """
        train_end = int(size * self.train) if self.validation + self.test > 0 else size
        return (
            train_end,
            min(size, int(size * (self.train + self.validation))) if self.test > 0 else size,
            size,
        )


def places(hashes: NDArray[np.uint64], salt: str) -> np.ndarray:
    """A number in [0, 1) for each content hash (uint64 `(n, 2)`), which depends on the hash and the salt
    alone: float64 `(n,)`.
    """
    start = np.uint64(int.from_bytes(hashlib.blake2b(salt.encode("utf-8"), digest_size=8).digest(), "little"))
    mixed: NDArray[np.uint64] = (hashes[:, 0] ^ start) + hashes[:, 1] * _SPECIAL
    for shift, factor in (
        (30, 0xBF58476D1CE4E5B9),
        (27, 0x94D049BB133111EB),
    ):  # splitmix64's finalizer (Steele et al. 2014)
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed = mixed ^ (mixed >> np.uint64(31))
    return (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53


def unit_hash(text: str, salt: str) -> float:
    """A number in [0, 1) that depends on the text and the salt alone."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=salt.encode("utf-8")).digest()
    return int.from_bytes(digest, "big") / 2**64


@dataclass(frozen=True)
class UnitPlan:
    """What becomes of one unit's documents: `codes[row]` is a place in `SPLITS`, or `LEFT_OUT`.

    A document over an edge between splits is in `cuts`: (bytes from its start at which a split ends, that
    split), ascending.
    """

    codes: bytes
    cuts: Mapping[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)


def plan_contiguous(
    sizes: np.ndarray, is_kept: np.ndarray, start: int, edges: tuple[int, int, int]
) -> UnitPlan:
    """The plan of a unit whose kept text begins `start` bytes into the corpus, which is cut at `edges`.
    Arrays are `(documents,)`.
    """
    lengths = np.where(is_kept, sizes, 0).astype(np.int64)
    ends = start + np.cumsum(lengths)
    begins = ends - lengths
    codes = np.minimum(np.searchsorted(edges, begins, side="right"), len(SPLITS) - 1).astype(np.uint8)
    cuts: dict[int, tuple[tuple[int, int], ...]] = {}
    for row in np.flatnonzero(is_kept & (ends > np.take(edges, codes))).tolist():
        begin, end = int(begins[row]), int(ends[row])
        first = next(edge for edge in range(3) if edges[edge] >= end)
        cuts[row] = tuple(
            (edges[code] - begin, code) for code in range(int(codes[row]), first + 1) if edges[code] > begin
        )
    codes[~is_kept] = LEFT_OUT
    return UnitPlan(codes.tobytes(), cuts)


def plan_by_hash(
    hashes: np.ndarray, given: np.ndarray, is_kept: np.ndarray, shares: Shares, seed: int
) -> UnitPlan:
    """The plan of a unit by hash; documents that say a split (`given`) get it. Arrays are `(documents,)`,
    hashes `(documents, 2)`.
    """
    codes = np.where(given == NO_SPLIT, shares.by_hash(hashes, seed), given).astype(np.uint8)
    codes[~is_kept] = LEFT_OUT
    return UnitPlan(codes.tobytes())


@dataclass(frozen=True, slots=True)
class Part:
    """Text on its way into one split (a place in `SPLITS`). `ends` says that the document (or what of it this split gets) ends here;
    `is_cut`
    that it does so only because the split does; `is_whole` that this is a whole document in one piece.
    """

    row: int
    split: int
    text: str
    ends: bool
    is_cut: bool
    is_whole: bool


def parts_of(plan: UnitPlan, pieces: Iterable[tuple[int, Piece]]) -> Iterator[Part]:
    """Say for each (row, piece) where it goes; a piece over an edge becomes two parts."""
    position, is_first = 0, True
    for row, piece in pieces:
        cuts = plan.cuts.get(row)
        if cuts is None:
            yield Part(row, plan.codes[row], piece.text, piece.is_last, False, is_first and piece.is_last)
        else:
            position = 0 if is_first else position
            found = list(_cut(row, piece, position, cuts))
            position += len(piece.text.encode("utf-8"))
            if len(found) == 1 and is_first and piece.is_last:
                yield Part(row, found[0].split, piece.text, True, False, True)
            else:
                yield from found
        is_first = piece.is_last


def _cut(row: int, piece: Piece, position: int, cuts: tuple[tuple[int, int], ...]) -> Iterator[Part]:
    """The parts of a piece that begins `position` bytes into its document."""
    text = piece.text
    for end, split in cuts:
        if position >= end or not text:
            continue
        taken = text[: _characters_in(text, end - position)]
        text = text[len(taken) :]
        position += len(taken.encode("utf-8"))
        is_document_end = piece.is_last and not text
        yield Part(row, split, taken, is_document_end or position >= end, not is_document_end, False)


def _characters_in(text: str, size: int) -> int:
    """How many characters reach `size` bytes of utf-8; one that crosses it counts."""
    if text.isascii() or size >= 4 * len(text):
        return min(size, len(text))
    raw = text.encode("utf-8")
    while size < len(raw) and raw[size] & 0xC0 == 0x80:
        size += 1
    return len(raw[:size].decode("utf-8"))
