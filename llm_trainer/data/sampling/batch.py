"""Batches, and the protocol of the samplers that make them.

Samplers differ in how documents become rows: concatenated (`window_sampler.py`), kept complete
(`packed_rows.py`), or drawn from several corpora (`mixture.py`). Training sees all of them through the one
protocol `Sampler`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llm_trainer.data.token_shards import TokenDataset

# The label of a token without loss: the default `ignore_index` of PyTorch's cross-entropy.
IGNORE_INDEX = -100


@dataclass(frozen=True)
class BatchSources:
    """Which corpora of a mixture a batch comes from.

    Attributes:
        names: All corpora of the mixture.
        numbers: Indices into `names`, int64: one per row (B,), or one per position (B, T) where rows mix
            corpora.
    """

    names: tuple[str, ...]
    numbers: Tensor


@dataclass(frozen=True)
class Batch:
    """Rows for the model.

    Attributes:
        input_ids: (B, T) int64.
        labels: (B, T) int64, already shifted: `labels[b, t]` is the token after `input_ids[b, t]`, or
            `IGNORE_INDEX` where there is no loss.
        document_ids: (B, T) int64, the documents of each row numbered from 0; None where a row is one
            document.
        num_supervised: Number of labels that are not `IGNORE_INDEX`.
        sources: The corpora of a mixture that the rows come from; None without a mixture.
    """

    input_ids: Tensor
    labels: Tensor
    document_ids: Tensor | None
    num_supervised: int
    sources: BatchSources | None = None

    def to(self, device: torch.device | str) -> Batch:
        """Copy the batch to `device`; the copy to a GPU goes through pinned memory and is asynchronous."""
        target = torch.device(device)
        if target == self.input_ids.device:
            return self

        def move(tensor: Tensor) -> Tensor:
            return (tensor.pin_memory() if target.type == "cuda" else tensor).to(target, non_blocking=True)

        documents = None if self.document_ids is None else move(self.document_ids)
        return Batch(move(self.input_ids), move(self.labels), documents, self.num_supervised, self.sources)

    def first(self, rows: int, positions: int | None = None) -> Batch:
        """Keep the first `rows` rows, each up to `positions`; `num_supervised` does not change."""
        part = (slice(rows), slice(positions))
        documents = None if self.document_ids is None else self.document_ids[part]
        sources = self.sources
        if sources is not None:
            sources = replace(sources, numbers=sources.numbers[part[: sources.numbers.ndim]])
        return replace(
            self,
            input_ids=self.input_ids[part],
            labels=self.labels[part],
            document_ids=documents,
            sources=sources,
        )

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, order: Tensor) -> Batch:
        """Reorder the rows by `order` (B,) int64; `sources` is dropped."""
        documents = None if self.document_ids is None else self.document_ids[order]
        return replace(
            self,
            input_ids=self.input_ids[order],
            labels=self.labels[order],
            document_ids=documents,
            sources=None,
        )


def concat_batches(batches: Sequence[Batch], *, with_documents: bool) -> Batch:
    """Concatenate batches along the rows.

    Args:
        batches: Batches of equal length T.
        with_documents: Give the result document ids; rows of batches without them count as one document.
    """
    documents = None
    if with_documents:
        documents = torch.cat(
            [torch.zeros_like(b.input_ids) if b.document_ids is None else b.document_ids for b in batches]
        )
    return Batch(
        torch.cat([batch.input_ids for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        documents,
        sum(batch.num_supervised for batch in batches),
    )


def sources_at(tokens: TokenDataset, offsets: np.ndarray) -> BatchSources | None:
    """The corpora of the tokens at these offsets (B, T) of a stream; None if the stream is one corpus."""
    if not tokens.corpora:
        return None
    return BatchSources(tokens.corpora, torch.from_numpy(tokens.corpus_indices(offsets)))


def without_labels(batch: Batch) -> Batch:
    """The same rows without any supervised label."""
    return replace(batch, labels=torch.full_like(batch.labels, IGNORE_INDEX), num_supervised=0)


class Sampler(Protocol):
    """A training order: sample i is a function of the shards, the seed and i.

    A sampler has no state and may be called from several threads.
    """

    @property
    def samples_per_epoch(self) -> int:
        """Samples in one pass over the data."""

    @property
    def tokens_per_sample(self) -> float:
        """Supervised tokens per sample, on average."""

    @property
    def order(self) -> str:
        """Describes what the order depends on besides shards, seed and context; a resumed run compares it."""

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples `first_sample … first_sample + count - 1` as one batch of `count` rows."""
