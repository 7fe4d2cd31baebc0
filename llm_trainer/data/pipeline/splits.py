"""Stage 3, `split`: assigns documents to training, validation and test.

By default the hash of a document's own text and the seed decide its split, so it stays in that split when
other documents are added or removed, and no order matters. Duplicates have been dropped before; with
near-deduplication, near-duplicates of a document cannot be in another split. A split by hash needs enough
documents for the sizes of the splits to come out right. With few documents, or a single one, the text is cut
at fixed positions instead and the last part is held out, as nanoGPT does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from llm_trainer.config.schema.data import DataConfig
from llm_trainer.data.deduplication.clusters import EXCLUDED
from llm_trainer.data.hashing import hash_fractions
from llm_trainer.data.pipeline.document_index import NO_SPLIT, SPLITS
from llm_trainer.data.sources.base import TextChunk
from llm_trainer.errors import UsageError

BY_HASH = "by the hash of each document"
CONTIGUOUS = "contiguous: too few documents for a split by hash, so the last part is held out"
FROM_SOURCE = "from the source"
_MIN_HELD_OUT = 8  # expected documents in the smallest split, for a split by hash


@dataclass(frozen=True)
class SplitRatios:
    """Fractions of the three splits, which add up to 1."""

    train: float
    validation: float
    test: float

    @classmethod
    def from_config(cls, config: DataConfig) -> SplitRatios:
        """The fractions that the settings describe.

        The rest that val_ratio and test_ratio leave is for training; if train_ratio is set and test_ratio is
        not, the rest is for testing.

        Raises:
            UsageError: The fractions do not add up to 1, or leave nothing for training.
        """
        validation, test = config.val_ratio, config.test_ratio
        train = config.train_ratio
        # A command's own default of train_ratio does not override what the user has set.
        if train is None or (not config.is_set("train_ratio") and train + validation + test != 1.0):
            train = 1.0 - validation - test
        elif not config.is_set("test_ratio"):
            test = max(0.0, round(1.0 - train - validation, 9))
        if abs(train + validation + test - 1.0) > 1e-6 or train <= 0:
            raise UsageError(
                f"train_ratio {train:g}, val_ratio {validation:g} and test_ratio {test:g} must add up to 1"
                " and leave something for training"
            )
        return cls(train, validation, test)

    def can_split_by_hash(self, documents: int) -> bool:
        """Whether this number of documents is enough for the held-out splits to get about their sizes."""
        held_out = [ratio for ratio in (self.validation, self.test) if ratio > 0]
        return not held_out or documents * min(held_out) >= _MIN_HELD_OUT

    def split_by_hash(self, hashes: np.ndarray, seed: int) -> np.ndarray:
        """The split of each document by its content hash.

        Args:
            hashes: uint64 `(documents, 2)`.
            seed: Random seed of the split.

        Returns:
            Indices into `SPLITS`, uint8 `(documents,)`.
        """
        fractions = hash_fractions(hashes, f"split {seed}")
        codes = np.zeros(len(hashes), dtype=np.uint8)
        codes[fractions < self.validation + self.test] = SPLITS.index("test")
        codes[fractions < self.validation] = SPLITS.index("validation")
        return codes

    def boundaries(self, size: int) -> tuple[int, int, int]:
        """The offsets at which training, validation and test end in a text of `size` bytes."""
        train_end = int(size * self.train) if self.validation + self.test > 0 else size
        return (
            train_end,
            min(size, int(size * (self.train + self.validation))) if self.test > 0 else size,
            size,
        )


@dataclass(frozen=True)
class PartitionPlan:
    """The splits of the documents of one partition.

    Attributes:
        codes: One byte per row: an index into `SPLITS`, or `EXCLUDED` if the document is in no split.
        cuts: Row of each document that is in several splits → (offset in bytes at which a split ends, index
            of that split), ascending.
    """

    codes: bytes
    cuts: Mapping[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)


def plan_contiguous(
    sizes: np.ndarray, is_kept: np.ndarray, start: int, boundaries: tuple[int, int, int]
) -> PartitionPlan:
    """Plan a partition of a corpus that is cut at fixed positions.

    Args:
        sizes: Bytes of each document, `(documents,)`.
        is_kept: Which documents are kept, bool `(documents,)`.
        start: Offset of the partition's kept text in that of the corpus, in bytes.
        boundaries: The offsets at which the three splits end.
    """
    lengths = np.where(is_kept, sizes, 0).astype(np.int64)
    ends = start + np.cumsum(lengths)
    begins = ends - lengths
    codes = np.minimum(np.searchsorted(boundaries, begins, side="right"), len(SPLITS) - 1).astype(np.uint8)
    cuts: dict[int, tuple[tuple[int, int], ...]] = {}
    for row in np.flatnonzero(is_kept & (ends > np.take(boundaries, codes))).tolist():
        begin, end = int(begins[row]), int(ends[row])
        last = next(code for code in range(3) if boundaries[code] >= end)
        cuts[row] = tuple(
            (boundaries[code] - begin, code)
            for code in range(int(codes[row]), last + 1)
            if boundaries[code] > begin
        )
    codes[~is_kept] = EXCLUDED
    return PartitionPlan(codes.tobytes(), cuts)


def plan_by_hash(
    hashes: np.ndarray, given: np.ndarray, is_kept: np.ndarray, ratios: SplitRatios, seed: int
) -> PartitionPlan:
    """Plan a partition by the hashes of its documents.

    Args:
        hashes: uint64 `(documents, 2)`.
        given: The split that the source assigns, or `NO_SPLIT`, uint8 `(documents,)`; it takes precedence.
        is_kept: Which documents are kept, bool `(documents,)`.
        ratios: The sizes of the splits.
        seed: Random seed of the split.
    """
    codes = np.where(given == NO_SPLIT, ratios.split_by_hash(hashes, seed), given).astype(np.uint8)
    codes[~is_kept] = EXCLUDED
    return PartitionPlan(codes.tobytes())


@dataclass(frozen=True, slots=True)
class SplitChunk:
    """Text of one document in one split.

    Attributes:
        row: The document's row in its index.
        split: Index into `SPLITS`.
        text: The text.
        ends: The document, or its part in this split, ends here.
        is_cut: It ends here only because the split does.
        is_whole: This is a complete document in one chunk.
    """

    row: int
    split: int
    text: str
    ends: bool
    is_cut: bool
    is_whole: bool


def assign_chunks(plan: PartitionPlan, chunks: Iterable[tuple[int, TextChunk]]) -> Iterator[SplitChunk]:
    """Assign each chunk to its split; a chunk across a boundary is divided.

    Args:
        plan: The splits of the partition's documents.
        chunks: The row and text of each chunk, in order.
    """
    position, is_first = 0, True
    for row, chunk in chunks:
        cuts = plan.cuts.get(row)
        if cuts is None:
            yield SplitChunk(
                row, plan.codes[row], chunk.text, chunk.is_last, False, is_first and chunk.is_last
            )
        else:
            position = 0 if is_first else position
            parts = list(_cut(row, chunk, position, cuts))
            position += len(chunk.text.encode("utf-8"))
            if len(parts) == 1 and is_first and chunk.is_last:
                yield SplitChunk(row, parts[0].split, chunk.text, True, False, True)
            else:
                yield from parts
        is_first = chunk.is_last


def _cut(
    row: int, chunk: TextChunk, position: int, cuts: tuple[tuple[int, int], ...]
) -> Iterator[SplitChunk]:
    """The parts of a chunk that begins `position` bytes into its document."""
    text = chunk.text
    for end, split in cuts:
        if position >= end or not text:
            continue
        taken = text[: _characters_in(text, end - position)]
        text = text[len(taken) :]
        position += len(taken.encode("utf-8"))
        is_document_end = chunk.is_last and not text
        yield SplitChunk(row, split, taken, is_document_end or position >= end, not is_document_end, False)


def _characters_in(text: str, size: int) -> int:
    """The number of characters in the first `size` bytes of UTF-8; one that is cut there counts."""
    if text.isascii() or size >= 4 * len(text):
        return min(size, len(text))
    raw = text.encode("utf-8")
    while size < len(raw) and raw[size] & 0xC0 == 0x80:
        size += 1
    return len(raw[:size].decode("utf-8"))
