"""From shards to batches: sample i is a function of the shards, the seed and i.

A sample is a window of `context` ids and the ids one place further, its labels. Each epoch lays non-overlapping windows over the stream
and takes them in the order of a keyed permutation (`permutation.py`), another one each epoch; the grid starts at another place each epoch
too, so that an id does not always meet the same neighbours (nanoGPT draws window starts at random, which has the same virtue but repeats
some ids and never shows others within an epoch). Nothing is stored and nothing depends on who asks: ranks, workers, a resume and a changed
batch size read the same samples, in O(1).

Documents. With `mask_documents` and more than one document `document_ids` tell the attention what belongs together. The end of text that
closes a document opens the next one: as a label it belongs to the document that it ends, as an input to the one that follows. So every
document is seen as `<end> text <end>`, each label is predicted from its own document alone, the first id of a text is learned as well, and
a model can write from nothing but `<end>`. Where documents have no end of text (characters), a document's last id predicts nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llm_trainer.config.errors import DataError
from llm_trainer.data.permutation import KeyedPermutation, combine
from llm_trainer.data.prefetch import Prefetcher
from llm_trainer.data.shards import TokenDataset

__all__ = ["IGNORED", "Batch", "Prefetcher", "WindowSampler", "validation_batches"]

IGNORED = -100  # the label of an id that is not supervised: PyTorch's own ignore_index
_SHIFTED_FROM = 16  # windows an epoch; with fewer, moving the grid would cost a noticeable share of the ids


@dataclass(frozen=True)
class Batch:
    """Rows for the model: `input_ids` and `labels` (B, T) int64, labels -100 where nothing is to be predicted.

    `document_ids` (B, T) int64 count the documents within each row from 0, or None where a row is one document.
    `num_supervised` is the number of labels that are not -100.
    """

    input_ids: Tensor
    labels: Tensor
    document_ids: Tensor | None
    num_supervised: int

    def to(self, device: torch.device | str) -> Batch:
        """The same on `device`; to an accelerator through pinned memory, without waiting for the copy."""
        target = torch.device(device)
        if target == self.input_ids.device:
            return self

        def move(tensor: Tensor) -> Tensor:
            return (tensor.pin_memory() if target.type == "cuda" else tensor).to(target, non_blocking=True)

        documents = None if self.document_ids is None else move(self.document_ids)
        return Batch(move(self.input_ids), move(self.labels), documents, self.num_supervised)

    def __len__(self) -> int:
        return len(self.input_ids)


class WindowSampler:
    """The training order over one stream. Raises DataError where the stream is shorter than one window.

    `samples_per_epoch` windows of `context` ids make an epoch; `batch(first_sample, count)` gives samples `first_sample …` of the endless
    sequence of epochs. Stateless and safe to call from several threads.
    """

    def __init__(self, tokens: TokenDataset, context: int, seed: int, mask_documents: bool = True) -> None:
        require_window(tokens, context)
        self.tokens, self.context, self.seed = tokens, context, seed
        self._windows = _Windows(tokens, context, mask_documents)
        whole = (tokens.num_tokens - 1) // context
        # One window less leaves room for the grid to start anywhere within a window's length.
        self.samples_per_epoch = whole - 1 if whole >= _SHIFTED_FROM else whole
        self._room = tokens.num_tokens - 1 - self.samples_per_epoch * context if whole >= _SHIFTED_FROM else 0
        self._orders: dict[int, KeyedPermutation] = {}

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples `first_sample … first_sample + count - 1` as one batch of `count` rows."""
        return self._windows.load(self.window_starts(np.arange(first_sample, first_sample + count)))

    def window_starts(self, samples: np.ndarray) -> np.ndarray:
        """Where in the stream each of these samples begins, int64 of the same shape."""
        samples = np.asarray(samples, dtype=np.int64)
        epochs, places = np.divmod(samples, self.samples_per_epoch)
        starts = np.empty_like(samples)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            starts[chosen] = self._order(epoch)(places[chosen]) * self.context + self._shift(epoch)
        return starts

    def _order(self, epoch: int) -> KeyedPermutation:
        order = self._orders.get(epoch)
        if order is None:
            order = KeyedPermutation(self.samples_per_epoch, combine(self.seed, epoch))
            self._orders = {epoch: order}  # a cache of the last one; losing a race between threads only costs making it again
        return order

    def _shift(self, epoch: int) -> int:
        return combine(self.seed, epoch, 1) % (self._room + 1)


def validation_batches(
    tokens: TokenDataset, context: int, batch_size: int, limit: int | None = None, mask_documents: bool = True
) -> Iterator[Batch]:
    """All non-overlapping windows in order; with `limit`, that many batches spread evenly over them.

    The last batch is filled with rows without labels where there were full ones before it, so that shapes stay the same (a compiled model
    is not compiled again). A stream shorter than one window gives one row, filled likewise. Raises DataError below two ids.
    """
    if tokens.num_tokens < 2:
        raise DataError(f"the validation split of {tokens.source} has {tokens.num_tokens} tokens; raise val_ratio, or give more text")
    windows = _Windows(tokens, context, mask_documents)
    total = (tokens.num_tokens - 1) // context
    if total == 0:
        yield windows.load_short()
        return
    chosen = total if limit is None else min(total, limit * batch_size)
    starts = (np.arange(chosen, dtype=np.int64) * total // chosen) * context
    for first in range(0, chosen, batch_size):
        part = starts[first : first + batch_size]
        yield windows.load(part, rows=batch_size if first else len(part))


def require_window(tokens: TokenDataset, context: int, *, source: str | None = None, setting: str = "max_position_embeddings") -> None:
    """Raise DataError where the stream does not hold one window and its last label; `setting` is what the user may lower."""
    if tokens.num_tokens < context + 1:
        raise DataError(
            f"{source or tokens.source} gives {tokens.num_tokens} training tokens, fewer than one window of {context} and its last label; "
            f"give more text, or {setting} of at most {max(1, tokens.num_tokens - 1)}"
        )


class _Windows:
    """Turns places in the stream into rows."""

    def __init__(self, tokens: TokenDataset, context: int, mask_documents: bool) -> None:
        self._tokens, self._context = tokens, context
        self._masked = mask_documents and tokens.num_documents > 1
        self._opens = 1 if tokens.end_id is not None else 0  # a document begins with the end that precedes it

    def load(self, starts: np.ndarray, rows: int | None = None) -> Batch:
        """One row for each of `starts`, and rows without labels up to `rows`."""
        rows = len(starts) if rows is None else rows
        ids = np.zeros((rows, self._context + 1), dtype=np.int64)
        for row, start in enumerate(starts.tolist()):
            self._tokens.read_into(start, ids[row])
        labels = ids[:, 1:].copy()
        documents = self._documents(starts, rows, labels) if self._masked else None
        labels[len(starts) :] = IGNORED
        is_whole = not self._masked or self._opens
        supervised = len(starts) * self._context if is_whole else int((labels != IGNORED).sum())
        inputs = torch.from_numpy(ids)[:, :-1].contiguous()
        return Batch(inputs, torch.from_numpy(labels), None if documents is None else torch.from_numpy(documents), supervised)

    def load_short(self) -> Batch:
        """The whole of a stream that is shorter than a window, as one row."""
        count = self._tokens.num_tokens - 1
        batch = _Windows(self._tokens, count, self._masked).load(np.zeros(1, dtype=np.int64))

        def filled(values: Tensor, value: int) -> Tensor:
            return torch.nn.functional.pad(values, (0, self._context - count), value=value)

        documents = None if batch.document_ids is None else filled(batch.document_ids, int(batch.document_ids.max()) + 1)
        return Batch(filled(batch.input_ids, 0), filled(batch.labels, IGNORED), documents, batch.num_supervised)

    def _documents(self, starts: np.ndarray, rows: int, labels: np.ndarray) -> np.ndarray:
        """Document of each input, counted within its row (B, T); where nothing opens a document, its first id is not a label."""
        begins = np.zeros((rows, self._context), dtype=np.int64)
        for row, start in enumerate(starts.tolist()):
            places = self._tokens.document_starts_in(start + 1, self._context)  # relative to start + 1: the place that ends the one before
            if self._opens:
                begins[row, places] = 1
            else:
                labels[row, places] = IGNORED
                begins[row, places[places < self._context - 1] + 1] = 1
        begins[:, 0] = 0
        counted: np.ndarray = begins.cumsum(axis=1)
        return counted
