"""Which document is for training, which for validation, which for testing.

By hash: a document's split is decided by its own text and the seed, so it stays where it is when others come or go, duplicates land
together, and no order matters. That needs enough documents for the shares to come out; with few, or one, the text is cut in one place
instead, the last part being held out, as nanoGPT does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from llm_trainer.config.data import DataConfig
from llm_trainer.config.errors import UsageError
from llm_trainer.data.documents import Piece

SPLITS = ("train", "validation", "test")
_ENOUGH_HELD_OUT = 8  # documents to be expected in the smallest split, for a split by hash


@dataclass(frozen=True)
class Shares:
    """Shares of the three splits; they add up to 1."""

    train: float
    validation: float
    test: float

    @classmethod
    def of(cls, config: DataConfig) -> Shares:
        """The shares that the settings mean. What they leave is for training, or for testing where train_ratio and no test_ratio is said.

        Raises UsageError where they do not add up to 1 or leave nothing for training.
        """
        validation, test = config.val_ratio, config.test_ratio
        train = config.train_ratio
        if train is None or (not config.is_said("train_ratio") and train + validation + test != 1.0):  # a door's default gives way
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

    def by_hash(self, text: str, seed: int) -> str:
        """The split of a document by its (first piece of) text."""
        place = unit_hash(text, f"split {seed}")
        if place < self.validation:
            return "validation"
        return "test" if place < self.validation + self.test else "train"

    def boundaries(self, size: int) -> tuple[int, int]:
        """Where a text of `size` is cut: training ends at the first, validation at the second, testing at `size`."""
        train_end = int(size * self.train) if self.validation + self.test > 0 else size
        return train_end, min(size, int(size * (self.train + self.validation))) if self.test > 0 else size


def unit_hash(text: str, salt: str) -> float:
    """A number in [0, 1) that depends on the text and the salt alone."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=salt.encode("utf-8")).digest()
    return int.from_bytes(digest, "big") / 2**64


@dataclass(frozen=True, slots=True)
class Part:
    """Text on its way into one split. `ends` says that the document (or what of it this split gets) ends here; `is_cut` that it does so
    only because the split does; `is_whole` that this is a whole document in one piece."""

    split: str
    text: str
    ends: bool
    is_cut: bool
    is_whole: bool


@dataclass(frozen=True)
class SplitPlan:
    """How the documents of one corpus are split: by hash, or cut at places counted in utf-8 bytes of the kept text."""

    shares: Shares
    seed: int
    by_hash: bool
    size: int

    @property
    def method(self) -> str:
        """In words, for metadata.json."""
        return "by the hash of each document" if self.by_hash else "contiguous: too few documents for hashes, so the last part is held out"

    def parts(self, pieces: Iterable[Piece]) -> Iterator[Part]:
        """Say for each piece where it goes; a piece over a cut becomes two parts."""
        position, is_first, split = 0, True, "train"
        train_end, validation_end = self.shares.boundaries(self.size)
        for piece in pieces:
            if piece.split is not None:
                yield Part(piece.split, piece.text, piece.is_last, False, is_first and piece.is_last)
            elif self.by_hash:
                split = self.shares.by_hash(piece.text, self.seed) if is_first else split
                yield Part(split, piece.text, piece.is_last, False, is_first and piece.is_last)
            else:
                ends = ((train_end, "train"), (validation_end, "validation"), (self.size, "test"))
                position, parts = _cut(piece, position, ends, is_first)
                yield from parts
            is_first = piece.is_last


def _cut(piece: Piece, position: int, ends: Sequence[tuple[int, str]], is_first: bool) -> tuple[int, list[Part]]:
    """(position after the piece, its parts), the piece beginning at `position` in bytes."""
    text, parts = piece.text, []
    for end, split in ends:
        if position >= end or not text:
            continue
        taken = text[: _characters_in(text, end - position)]
        text = text[len(taken) :]
        position += len(taken.encode("utf-8"))
        if taken:
            is_last = not text
            parts.append(Part(split, taken, piece.is_last or not is_last or position >= end, not (piece.is_last and is_last), False))
    if len(parts) == 1 and is_first and piece.is_last:
        parts = [Part(parts[0].split, piece.text, True, False, True)]
    return position, parts


def _characters_in(text: str, size: int) -> int:
    """How many characters reach `size` bytes of utf-8; one that crosses it counts."""
    if text.isascii() or size >= 4 * len(text):
        return min(size, len(text))
    raw = text.encode("utf-8")
    while size < len(raw) and raw[size] & 0xC0 == 0x80:
        size += 1
    return len(raw[:size].decode("utf-8"))
