"""What a sampler gives: batches of rows for the model, by the number of the sample.

Samplers differ in how documents become rows (`windows.py`: end to end; `rows.py`: whole documents;
`mixture.py`: from several corpora); training sees this one face of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llm_trainer.data.token_shards import TokenDataset

IGNORED = -100  # the label of an id that is not supervised: PyTorch's own ignore_index


@dataclass(frozen=True)
class Sources:
    """Which corpora a batch is from: `numbers` int64 count in `names`, one a row, (B,), or where rows mix
    corpora one a place, (B, T).
    """

    names: tuple[str, ...]
    numbers: Tensor

    def of_rows(self) -> list[str]:
        """The name of each row's corpus, where it is in one."""
        return [self.names[number] for number in self.numbers.tolist()]


@dataclass(frozen=True)
class Batch:
    """Rows for the model: `input_ids` and `labels` (B, T) int64, labels -100 where nothing is to be
    predicted.

    `document_ids` (B, T) int64 count the documents within each row from 0, or None where a row is one document.
    `num_supervised` is the number of labels that are not -100. `sources` says which corpora of a mixture they are from.
    """

    input_ids: Tensor
    labels: Tensor
    document_ids: Tensor | None
    num_supervised: int
    sources: Sources | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same on `device`; to an accelerator through pinned memory, without waiting for the copy."""
        target = torch.device(device)
        if target == self.input_ids.device:
            return self

        def move(tensor: Tensor) -> Tensor:
            return (tensor.pin_memory() if target.type == "cuda" else tensor).to(target, non_blocking=True)

        documents = None if self.document_ids is None else move(self.document_ids)
        return Batch(move(self.input_ids), move(self.labels), documents, self.num_supervised, self.sources)

    def first(self, rows: int, places: int | None = None) -> Batch:
        """The first rows, each up to `places`; `num_supervised` stays that of the whole."""
        part = (slice(rows), slice(places))
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
        """The rows in another order, `order` (B,) int64; what they are from is forgotten."""
        documents = None if self.document_ids is None else self.document_ids[order]
        return replace(
            self,
            input_ids=self.input_ids[order],
            labels=self.labels[order],
            document_ids=documents,
            sources=None,
        )


def joined(batches: Sequence[Batch], *, with_documents: bool) -> Batch:
    """The rows of several batches as one; `with_documents`, rows of batches without document ids are one
    document each.
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


def sources_at(tokens: TokenDataset, places: np.ndarray) -> Sources | None:
    """The corpora of the tokens at these places (B, T) of a stream; None for a stream of one."""
    return Sources(tokens.corpora, torch.from_numpy(tokens.corpus_of(places))) if tokens.corpora else None


def unsupervised(batch: Batch) -> Batch:
    """The same rows with nothing to predict."""
    return replace(batch, labels=torch.full_like(batch.labels, IGNORED), num_supervised=0)


class Sampler(Protocol):
    """A training order: sample i is a function of the shards, the seed and i. Stateless, safe to call from
    several threads.
    """

    @property
    def samples_per_epoch(self) -> int:
        """Samples in one pass over the data."""

    @property
    def tokens_per_sample(self) -> float:
        """Supervised tokens in a sample, on average."""

    @property
    def order(self) -> str:
        """What the order follows from beside shards, seed and context, in words: a resumed run compares it."""

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples `first_sample … first_sample + count - 1` as one batch of `count` rows."""
