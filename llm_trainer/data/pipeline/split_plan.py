"""The corpus after stage 3: each partition with the splits of its documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import JsonValue

from llm_trainer.data.cleaning.cleaner import DocumentCleaner
from llm_trainer.data.pipeline.deduplicate import KEPT
from llm_trainer.data.pipeline.document_index import NO_SPLIT, SPLITS, DocumentIndex, reread_documents
from llm_trainer.data.pipeline.splits import (
    BY_HASH,
    CONTIGUOUS,
    FROM_SOURCE,
    PartitionPlan,
    SplitChunk,
    SplitRatios,
    assign_chunks,
    plan_by_hash,
    plan_contiguous,
)


@dataclass(frozen=True)
class PlannedPartition:
    """A partition and the splits of its documents.

    Attributes:
        index: Its documents.
        cleaner: The cleaner that the index was made with.
        plan: Their splits.
        size: Bytes of the documents that are kept.
    """

    index: DocumentIndex
    cleaner: DocumentCleaner
    plan: PartitionPlan
    size: int

    @property
    def name(self) -> str:
        """The partition's name."""
        return self.index.partition.name

    @property
    def inputs(self) -> list[JsonValue]:
        """Everything that decides a result made from the partition's text; part of that result's key."""
        cuts: dict[str, JsonValue] = {
            str(row): [list(cut) for cut in cuts] for row, cuts in self.plan.cuts.items()
        }
        return [self.index.key, hashlib.sha256(self.plan.codes).hexdigest(), cuts]

    def read_chunks(self, is_wanted: bytes) -> Iterator[SplitChunk]:
        """Read the text of the wanted documents (one byte per row), each chunk with its split."""
        chunks = reread_documents(self.index.partition, self.cleaner, is_wanted)
        return assign_chunks(self.plan, chunks)


@dataclass(frozen=True)
class SplitPlan:
    """All partitions with the splits of their documents.

    Attributes:
        partitions: The partitions, in order.
        states: The states of stage 2, uint8 `(documents,)` over all partitions.
        method: How splits were assigned, as a phrase.
        splits: The splits of the result.
        training_bytes: Bytes of text in the training split.
    """

    partitions: list[PlannedPartition]
    states: np.ndarray
    method: str
    splits: list[str]
    training_bytes: int

    @property
    def codes(self) -> np.ndarray:
        """The split of each document, or `EXCLUDED`: uint8 `(documents,)` over all partitions."""
        return np.frombuffer(b"".join(one.plan.codes for one in self.partitions), dtype=np.uint8)

    def states_by_partition(self) -> Iterator[bytes]:
        """The part of `states` that belongs to each partition."""
        first = 0
        for one in self.partitions:
            last = first + len(one.plan.codes)
            yield self.states[first:last].tobytes()
            first = last


def plan_splits(
    indexes: Sequence[DocumentIndex],
    states: np.ndarray,
    cleaner: DocumentCleaner,
    ratios: SplitRatios,
    seed: int,
) -> SplitPlan:
    """Assign a split to every kept document.

    The split comes from the source if it has splits of its own, else from the document's hash, or, with too
    few documents for that, from its position in the corpus.

    Args:
        indexes: The documents.
        states: Their states, uint8 `(documents,)`.
        cleaner: The cleaner that the indexes were made with.
        ratios: The sizes of the splits.
        seed: Random seed of the split by hash.
    """
    given = {
        SPLITS[code]
        for index in indexes
        for code in np.unique(index.rows()["split"]).tolist()
        if code != NO_SPLIT
    }
    is_by_hash = bool(given) or ratios.can_split_by_hash(int((states == KEPT).sum()))
    sizes = [int(index.rows()["size"][kept].sum()) for index, kept in _with_kept(indexes, states)]
    boundaries, start, training = ratios.boundaries(sum(sizes)), 0, 0
    partitions = []
    for (index, kept), size in zip(_with_kept(indexes, states), sizes, strict=True):
        rows = index.rows()
        if is_by_hash:
            plan = plan_by_hash(rows["hash"], rows["split"], kept, ratios, seed)
            training += int(
                rows["size"][np.frombuffer(plan.codes, dtype=np.uint8) == SPLITS.index("train")].sum()
            )
        else:
            plan = plan_contiguous(rows["size"], kept, start, boundaries)
        partitions.append(PlannedPartition(index, cleaner, plan, size))
        start += size
    method = FROM_SOURCE if given else BY_HASH if is_by_hash else CONTIGUOUS
    wanted = {"train": True, "validation": ratios.validation > 0, "test": ratios.test > 0}
    splits = [split for split in SPLITS if split == "train" or (split in given if given else wanted[split])]
    return SplitPlan(partitions, states, method, splits, training if is_by_hash else boundaries[0])


def _with_kept(
    indexes: Sequence[DocumentIndex], states: np.ndarray
) -> Iterator[tuple[DocumentIndex, np.ndarray]]:
    """Each index, and which of its documents are kept: bool `(documents,)`."""
    first = 0
    for index in indexes:
        last = first + len(index.rows())
        yield index, states[first:last] == KEPT
        first = last
