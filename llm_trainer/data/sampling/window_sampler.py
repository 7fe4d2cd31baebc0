"""Greedy packing: documents end to end as one stream, and rows as windows over it.

A sample is a window of `context` ids and the ids one place further, its labels. Each epoch lays windows over the stream side by side (or
`stride` ids into each other) and takes them in the order of a keyed permutation (`permutation.py`), another one each epoch; the grid
starts at another place each epoch too, so that an id does not always meet the same neighbours (nanoGPT draws window starts at random, which
has the same virtue but repeats some ids and never shows others within an epoch). Nothing is stored and nothing depends on who asks: ranks,
workers, a resume and a changed batch size read the same samples, in O(1).

Documents. With `mask_documents` and more than one document `document_ids` tell the attention what belongs
together. The end of text that closes a document opens the next one: as a label it belongs to the document
that it ends, as an input to the one that follows. So every document is seen as `<end> text <end>`, each label
is predicted from its own document alone, the first id of a text is learned as well, and a model can write
from nothing but `<end>`. Where documents have no end of text (characters), a document's last id predicts
nothing.
"""

from __future__ import annotations

import numpy as np
import torch

from llm_trainer.data.sampling.batch import IGNORED, Batch, sources_at
from llm_trainer.data.sampling.packing import Packing, greedy_rows
from llm_trainer.data.sampling.permutation import KeyedPermutation, combine
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.errors import DataError

_SHIFTED_FROM = 16  # windows an epoch; with fewer, moving the grid would cost a noticeable share of the ids


class WindowSampler:
    """The training order over one stream. Raises DataError where the stream is shorter than one window.

    `samples_per_epoch` windows of `context` ids make an epoch; `batch(first_sample, count)` gives samples `first_sample …` of the endless
    sequence of epochs. With a `stride` neighbouring windows share so many ids, whose labels count in the earlier one.
    """

    def __init__(
        self, tokens: TokenDataset, context: int, seed: int, mask_documents: bool = True, stride: int = 0
    ) -> None:
        require_window(tokens, context)
        self.tokens, self.context, self.seed = tokens, context, seed
        packing = Packing("greedy", stride, mask_documents)
        self.order = str(packing)
        self._windows = Windows(tokens, context, packing)
        self._step = packing.step(context)
        whole = 1 + (tokens.num_tokens - 1 - context) // self._step
        # One window less leaves room for the grid to start anywhere within a step.
        self.samples_per_epoch = whole - 1 if whole >= _SHIFTED_FROM else whole
        laid = (self.samples_per_epoch - 1) * self._step + context
        self._room = tokens.num_tokens - 1 - laid if whole >= _SHIFTED_FROM else 0
        self._orders: dict[int, KeyedPermutation] = {}

    @property
    def tokens_per_sample(self) -> float:
        """Supervised tokens in a sample, on average."""
        return self._windows.labels_per_token * self._step

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples `first_sample … first_sample + count - 1` as one batch of `count` rows."""
        places, starts = self._locate(np.arange(first_sample, first_sample + count))
        return self._windows.load(starts, is_first=places == 0)

    def window_starts(self, samples: np.ndarray) -> np.ndarray:
        """Where in the stream each of these samples begins, int64 of the same shape."""
        return self._locate(samples)[1]

    def _locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which window of its epoch's grid each sample is, and where in the stream it begins."""
        epochs, numbers = np.divmod(np.asarray(samples, dtype=np.int64), self.samples_per_epoch)
        places, starts = np.empty_like(numbers), np.empty_like(numbers)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            places[chosen] = self._order(epoch)(numbers[chosen])
            starts[chosen] = places[chosen] * self._step + self._shift(epoch)
        return places, starts

    def _order(self, epoch: int) -> KeyedPermutation:
        order = self._orders.get(epoch)
        if order is None:
            order = KeyedPermutation(self.samples_per_epoch, combine(self.seed, epoch))
            self._orders = {
                epoch: order
            }  # a cache of the last one; losing a race between threads only costs making it again
        return order

    def _shift(self, epoch: int) -> int:
        return combine(self.seed, epoch, 1) % (self._room + 1)


def require_window(
    tokens: TokenDataset, context: int, *, source: str | None = None, setting: str = "max_position_embeddings"
) -> None:
    """Raise DataError where the stream does not hold one window and its last label; `setting` is what the
    user may lower.
    """
    if tokens.num_tokens < context + 1:
        raise DataError(
            f"{source or tokens.source} gives {tokens.num_tokens} training tokens, fewer than one window of {context} and its last label; "
            f"give more text, or {setting} of at most {max(1, tokens.num_tokens - 1)}"
        )


class Windows:
    """Turns places in the stream into rows; window `i` of `count` begins at `i` steps, and the last may be
    shorter than the others.
    """

    def __init__(self, tokens: TokenDataset, context: int, packing: Packing) -> None:
        self._tokens, self._context, self._stride, self._step = (
            tokens,
            context,
            packing.stride,
            packing.step(context),
        )
        self._masked = packing.mask_documents and tokens.num_documents > 1
        self._opens = 1 if tokens.end_id is not None else 0  # a document begins with the end that precedes it
        self.count = greedy_rows(tokens.num_tokens, context, packing.stride)

    @property
    def labels_per_token(self) -> float:
        """Share of the ids that are supervised: all but the first ones of documents that nothing opens."""
        lost = self._tokens.num_documents if self._masked and not self._opens else 0
        return 1 - lost / self._tokens.num_tokens

    def rows(self, numbers: np.ndarray, rows: int | None = None) -> Batch:
        """The windows of these numbers, and rows without labels up to `rows`."""
        return self.load(numbers * self._step, rows, is_first=numbers == 0)

    def load(self, starts: np.ndarray, rows: int | None = None, is_first: np.ndarray | None = None) -> Batch:
        """One row for each of `starts`, and rows without labels up to `rows`; with a stride all but a pass's
        first leave some to others.
        """
        rows = len(starts) if rows is None else rows
        ids = np.zeros((rows, self._context + 1), dtype=np.int64)
        lengths = np.minimum(self._context, self._tokens.num_tokens - 1 - starts)
        for row, start in enumerate(starts.tolist()):
            self._tokens.read_into(start, ids[row, : lengths[row] + 1])
        labels = ids[:, 1:].copy()
        documents = self._documents(starts, rows, labels) if self._masked else None
        for row in np.flatnonzero(lengths < self._context).tolist():
            self._leave_empty(row, int(lengths[row]), labels, documents)
        labels[len(starts) :] = IGNORED
        if self._stride and is_first is not None:
            labels[: len(starts)][~is_first, : self._stride] = IGNORED
        is_whole = (not self._masked or self._opens) and not self._stride
        supervised = int(lengths.sum()) if is_whole else int((labels != IGNORED).sum())
        inputs = torch.from_numpy(ids)[:, :-1].contiguous()
        found = None if documents is None else torch.from_numpy(documents)
        # A place belongs to the text of its label where an end of text opens that.
        begins = np.zeros(rows, dtype=np.int64)
        begins[: len(starts)] = starts + self._opens
        places = np.minimum(begins[:, None] + np.arange(self._context), self._tokens.num_tokens - 1)
        return Batch(inputs, torch.from_numpy(labels), found, supervised, sources_at(self._tokens, places))

    @staticmethod
    def _leave_empty(row: int, length: int, labels: np.ndarray, documents: np.ndarray | None) -> None:
        """What lies past the stream's end is a document of its own, without labels."""
        labels[row, length:] = IGNORED
        if documents is not None:
            documents[row, length:] = documents[row, length - 1] + 1

    def _documents(self, starts: np.ndarray, rows: int, labels: np.ndarray) -> np.ndarray:
        """Document of each input, counted within its row (B, T); where nothing opens a document, its first id
        is not a label.
        """
        begins = np.zeros((rows, self._context), dtype=np.int64)
        for row, start in enumerate(starts.tolist()):
            places = self._tokens.document_starts_in(
                start + 1, self._context
            )  # relative to start + 1: the place that ends the one before
            if self._opens:
                begins[row, places] = 1
            else:
                labels[row, places] = IGNORED
                begins[row, places[places < self._context - 1] + 1] = 1
        begins[:, 0] = 0
        counted: np.ndarray = begins.cumsum(axis=1)
        return counted
