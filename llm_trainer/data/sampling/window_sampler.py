"""Greedy packing: all documents are concatenated into one stream, and rows are windows over it.

A sample is a window of `context` ids; its labels are the ids one position further. Each epoch divides the
stream into windows without gaps (or with an overlap of `stride` ids) and reads them in the order of a keyed
permutation (`permutation.py`), which differs for each epoch. The grid of windows also starts at another
offset in each epoch, so that an id does not always have the same neighbours. (nanoGPT draws the starts of
windows at random, which has the same advantage, but repeats some ids and skips others within an epoch.)
Nothing is stored: any number of ranks and workers, a resumed run and a run with another batch size read the
same samples, each of them in O(1).

With `mask_documents` and more than one document, `document_ids` restrict attention to the own document. The
end-of-text token that ends a document also precedes the next one: as a label it belongs to the document that
it ends, as an input to the one that follows. So every document is read as `<end> text <end>`, each label is
predicted from its own document alone, the first id of a text is learned as well, and a model can generate
from `<end>` alone. Where documents have no end-of-text token (character tokenizers), the last id of a
document predicts nothing.
"""

from __future__ import annotations

import numpy as np
import torch

from llm_trainer.data.hashing import derive_key
from llm_trainer.data.sampling.batch import IGNORE_INDEX, Batch, sources_at
from llm_trainer.data.sampling.packing import Packing, count_greedy_rows
from llm_trainer.data.sampling.permutation import KeyedPermutation
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.errors import DataError

_MIN_SHIFTED_WINDOWS = 16  # per epoch; with fewer, shifting the grid would skip a noticeable part of the ids


class WindowSampler:
    """The training order over one stream.

    Attributes:
        samples_per_epoch: Number of windows in one pass over the data.
        order: Describes the packing; a resumed run compares it.
    """

    def __init__(
        self, tokens: TokenDataset, context: int, seed: int, mask_documents: bool = True, stride: int = 0
    ) -> None:
        """Divide the stream into windows.

        Args:
            tokens: The stream.
            context: Tokens per row.
            seed: Random seed of the order.
            mask_documents: Tokens attend only to their own document.
            stride: Ids that neighbouring windows have in common; their labels count in the earlier window.

        Raises:
            DataError: The stream is shorter than one window.
        """
        check_fits_window(tokens, context)
        self.tokens, self.context, self.seed = tokens, context, seed
        packing = Packing("greedy", stride, mask_documents)
        self.order = str(packing)
        self._rows = WindowRows(tokens, context, packing)
        self._step = packing.chunk_step(context)
        full_windows = 1 + (tokens.num_tokens - 1 - context) // self._step
        is_shifted = full_windows >= _MIN_SHIFTED_WINDOWS
        # One window less leaves room for the grid to start at any offset within a step.
        self.samples_per_epoch = full_windows - 1 if is_shifted else full_windows
        covered = (self.samples_per_epoch - 1) * self._step + context
        self._room = tokens.num_tokens - 1 - covered if is_shifted else 0
        self._orders: dict[int, KeyedPermutation] = {}

    @property
    def tokens_per_sample(self) -> float:
        """Supervised tokens per sample, on average."""
        return self._rows.supervised_fraction * self._step

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples `first_sample … first_sample + count - 1` as one batch of `count` rows."""
        windows, starts = self.locate(np.arange(first_sample, first_sample + count))
        return self._rows.load(starts, is_first=windows == 0)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where samples are in the stream.

        Args:
            samples: Numbers of samples, int64.

        Returns:
            The number of each sample's window in the grid of its epoch, and the offset at which it begins in
            the stream, int64 of the same shape.
        """
        epochs, numbers = np.divmod(np.asarray(samples, dtype=np.int64), self.samples_per_epoch)
        windows, starts = np.empty_like(numbers), np.empty_like(numbers)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            windows[chosen] = self._order(epoch)(numbers[chosen])
            starts[chosen] = windows[chosen] * self._step + self._shift(epoch)
        return windows, starts

    def _order(self, epoch: int) -> KeyedPermutation:
        order = self._orders.get(epoch)
        if order is None:
            order = KeyedPermutation(self.samples_per_epoch, derive_key(self.seed, epoch))
            # Only the last one is cached. If two threads compute it at once, that only costs time.
            self._orders = {epoch: order}
        return order

    def _shift(self, epoch: int) -> int:
        return derive_key(self.seed, epoch, 1) % (self._room + 1)


def check_fits_window(
    tokens: TokenDataset, context: int, *, source: str | None = None, setting: str = "max_position_embeddings"
) -> None:
    """Check that a stream holds at least one window and the label of its last id.

    Args:
        tokens: The stream.
        context: Tokens per window.
        source: What the error calls the data.
        setting: The setting that the error advises to lower.

    Raises:
        DataError: The stream is too short.
    """
    if tokens.num_tokens < context + 1:
        raise DataError(
            f"{source or tokens.source} has {tokens.num_tokens} training tokens, fewer than one window of"
            f" {context} tokens and its last label; give more text, or set {setting} to at most"
            f" {max(1, tokens.num_tokens - 1)}"
        )


class WindowRows:
    """Reads windows of a stream as rows; window `i` begins at `i` steps, and the last one may be shorter.

    Attributes:
        count: Number of windows.
    """

    def __init__(self, tokens: TokenDataset, context: int, packing: Packing) -> None:
        """See `WindowSampler` for the arguments."""
        self._tokens, self._context, self._stride, self._step = (
            tokens,
            context,
            packing.stride,
            packing.chunk_step(context),
        )
        self._masked = packing.mask_documents and tokens.num_documents > 1
        self._opens = 1 if tokens.eos_id is not None else 0  # documents begin with the preceding end of text
        self.count = count_greedy_rows(tokens.num_tokens, context, packing.stride)

    @property
    def supervised_fraction(self) -> float:
        """Fraction of the ids that are labels: all but first ids of documents without an end before them."""
        lost = self._tokens.num_documents if self._masked and not self._opens else 0
        return 1 - lost / self._tokens.num_tokens

    def rows(self, numbers: np.ndarray, rows: int | None = None) -> Batch:
        """Read windows.

        Args:
            numbers: Window numbers, int64 `(n,)`.
            rows: Pad the batch to this many rows with rows without labels.
        """
        return self.load(numbers * self._step, rows, is_first=numbers == 0)

    def load(self, starts: np.ndarray, rows: int | None = None, is_first: np.ndarray | None = None) -> Batch:
        """Read the windows that begin at these offsets.

        Args:
            starts: Offsets in the stream, int64 `(n,)`.
            rows: Pad the batch to this many rows with rows without labels.
            is_first: bool `(n,)`, the windows that no other one precedes; with a stride, the overlap of all
                other windows is not supervised.
        """
        rows = len(starts) if rows is None else rows
        ids = np.zeros((rows, self._context + 1), dtype=np.int64)
        lengths = np.minimum(self._context, self._tokens.num_tokens - 1 - starts)
        for row, start in enumerate(starts.tolist()):
            self._tokens.read_into(start, ids[row, : lengths[row] + 1])
        labels = ids[:, 1:].copy()
        documents = self._documents(starts, rows, labels) if self._masked else None
        for row in np.flatnonzero(lengths < self._context).tolist():
            self._clear_end(row, int(lengths[row]), labels, documents)
        labels[len(starts) :] = IGNORE_INDEX
        if self._stride and is_first is not None:
            labels[: len(starts)][~is_first, : self._stride] = IGNORE_INDEX
        all_supervised = (not self._masked or self._opens) and not self._stride
        supervised = int(lengths.sum()) if all_supervised else int((labels != IGNORE_INDEX).sum())
        inputs = torch.from_numpy(ids)[:, :-1].contiguous()
        document_ids = None if documents is None else torch.from_numpy(documents)
        # A position belongs to the corpus of its label where an end of text precedes each document.
        begins = np.zeros(rows, dtype=np.int64)
        begins[: len(starts)] = starts + self._opens
        offsets = np.minimum(begins[:, None] + np.arange(self._context), self._tokens.num_tokens - 1)
        sources = sources_at(self._tokens, offsets)
        return Batch(inputs, torch.from_numpy(labels), document_ids, supervised, sources)

    @staticmethod
    def _clear_end(row: int, length: int, labels: np.ndarray, documents: np.ndarray | None) -> None:
        """Positions past the end of the stream become a document of their own, without labels."""
        labels[row, length:] = IGNORE_INDEX
        if documents is not None:
            documents[row, length:] = documents[row, length - 1] + 1

    def _documents(self, starts: np.ndarray, rows: int, labels: np.ndarray) -> np.ndarray:
        """The document of each input, numbered within its row: int64 (B, T).

        Where no end of text precedes a document, the label of its first id is removed from `labels`.
        """
        begins = np.zeros((rows, self._context), dtype=np.int64)
        for row, start in enumerate(starts.tolist()):
            # Relative to start + 1: the position of the token that ends the document before.
            positions = self._tokens.document_starts_in(start + 1, self._context)
            if self._opens:
                begins[row, positions] = 1
            else:
                labels[row, positions] = IGNORE_INDEX
                begins[row, positions[positions < self._context - 1] + 1] = 1
        begins[:, 0] = 0
        counted: np.ndarray = begins.cumsum(axis=1)
        return counted
