"""Rows of complete documents: the table of which document is in which row, and the rows made from it.

The table is computed once from the lengths of the documents (`packing.py`); row i is then found in O(1). It
takes 17 bytes per segment and 8 per row. Small tables stay in memory. A table of more than a million segments
is written to disk while it is computed and memory-mapped, so that memory stays flat: into the folder
`.packing` next to the shards, where the next run and the other ranks of this one find it, or into a temporary
folder if that one cannot be written. The file name is a hash of everything the table depends on, so a table
is never stale.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from rich.console import Console

from llm_trainer.data.hashing import derive_key
from llm_trainer.data.progress import ByteProgress
from llm_trainer.data.sampling.batch import IGNORE_INDEX, Batch, sources_at
from llm_trainer.data.sampling.packing import SEGMENT, Packing, Segment, pack_segments, split_documents
from llm_trainer.data.sampling.permutation import KeyedPermutation
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.errors import DataError

INDEX_FOLDER = ".packing"
MAX_IN_MEMORY_SEGMENTS = 2**20
_VERSION = 1  # raise it when `pack_segments` makes other rows of the same documents
_BUFFERED_SEGMENTS = 2**16


class PackedRows:
    """The rows of a stream under `first_fit` or `none`.

    Attributes:
        count: Number of rows.
        supervised: Number of labels in all of them.
    """

    def __init__(
        self, tokens: TokenDataset, context: int, packing: Packing, console: Console | None = None
    ) -> None:
        """Compute or find the table of rows.

        Args:
            tokens: The stream.
            context: Tokens per row.
            packing: How documents become rows.
            console: Shows progress while the table of a large corpus is computed.

        Raises:
            UsageError: The stride is not smaller than a row.
        """
        self._tokens, self._context = tokens, context
        packing.chunk_step(context)
        self._masked = packing.mask_documents and packing.strategy == "first_fit"
        self._segments, self._ends = _table(tokens, context, packing, console)
        self.count = len(self._ends)
        self.supervised = tokens.num_tokens - (tokens.num_documents if tokens.eos_id is None else 0)

    def rows(self, numbers: np.ndarray, rows: int | None = None) -> Batch:
        """Read rows.

        Args:
            numbers: Row numbers, int64 `(n,)`.
            rows: Pad the batch to this many rows with rows without labels.
        """
        shape = (len(numbers) if rows is None else rows, self._context)
        inputs, documents, offsets = (np.zeros(shape, dtype=np.int64) for _ in range(3))
        labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        for row, number in enumerate(numbers.tolist()):
            self._fill(number, inputs[row], labels[row], documents[row], offsets[row])
        document_ids = torch.from_numpy(documents) if self._masked else None
        supervised, sources = int((labels != IGNORE_INDEX).sum()), sources_at(self._tokens, offsets)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(labels), document_ids, supervised, sources)

    def _fill(
        self, number: int, inputs: np.ndarray, labels: np.ndarray, documents: np.ndarray, offsets: np.ndarray
    ) -> None:
        begin = int(self._ends[number - 1]) if number else 0
        position = 0
        for document, (first, count, overlap, opens) in enumerate(
            self._segments[begin : int(self._ends[number])].tolist()
        ):
            sequence = np.empty(count + 1, dtype=np.int64)
            if opens:
                sequence[0] = self._tokens.eos_id
            self._tokens.read_into(first - (not opens), sequence[opens:])
            end = position + count
            inputs[position:end], labels[position:end] = sequence[:-1], sequence[1:]
            labels[position : position + overlap] = IGNORE_INDEX
            documents[position:end], offsets[position:end] = document, np.arange(first, first + count)
            position = end
            documents[position:] = document + 1


class PackedRowSampler:
    """The training order over packed rows: the same rows in every epoch, in another order."""

    def __init__(
        self, tokens: TokenDataset, context: int, seed: int, packing: Packing, console: Console | None = None
    ) -> None:
        """Compute or find the table of rows.

        Args:
            tokens: The stream.
            context: Tokens per row.
            seed: Random seed of the order.
            packing: How documents become rows.
            console: Shows progress while the table of a large corpus is computed.

        Raises:
            DataError: The stream has no label.
            UsageError: The stride is not smaller than a row.
        """
        self._rows, self.seed, self.order = PackedRows(tokens, context, packing, console), seed, str(packing)
        if not self._rows.count or self._rows.supervised < 1:
            raise DataError(
                f"{tokens.source} has {tokens.num_tokens} training tokens, so there is nothing to predict;"
                " give more text"
            )
        self.samples_per_epoch = self._rows.count
        self.tokens_per_sample = self._rows.supervised / self._rows.count
        self._orders: dict[int, KeyedPermutation] = {}

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples `first_sample … first_sample + count - 1` as one batch of `count` rows."""
        return self._rows.rows(self.row_numbers(np.arange(first_sample, first_sample + count)))

    def row_numbers(self, samples: np.ndarray) -> np.ndarray:
        """The row of each of these samples, int64 of the same shape."""
        epochs, indices = np.divmod(np.asarray(samples, dtype=np.int64), self.samples_per_epoch)
        found = np.empty_like(indices)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            found[chosen] = self._order(epoch)(indices[chosen])
        return found

    def _order(self, epoch: int) -> KeyedPermutation:
        order = self._orders.get(epoch)
        if order is None:
            order = KeyedPermutation(self.samples_per_epoch, derive_key(self.seed, epoch))
            self._orders = {epoch: order}
        return order


_Table = tuple[np.ndarray, np.ndarray]  # segments (SEGMENT), and the end of each row among them (uint64)


def _table(tokens: TokenDataset, context: int, packing: Packing, console: Console | None) -> _Table:
    """The table of a stream: from the cache in `tokens`, from the files next to the shards, or computed."""
    key = (context, packing.strategy, packing.stride)
    if key not in tokens.row_tables:
        at_most = tokens.num_documents + tokens.num_tokens // packing.chunk_step(context)
        with ByteProgress(
            console, f"packing rows ({packing})", tokens.num_tokens * tokens.item_bytes
        ) as progress:
            make = _in_files if at_most > MAX_IN_MEMORY_SEGMENTS else _in_memory
            tokens.row_tables[key] = make(tokens, context, packing, progress)
    return tokens.row_tables[key]


def _rows_of(
    tokens: TokenDataset, context: int, packing: Packing, progress: ByteProgress
) -> Iterator[list[Segment]]:
    def documents() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for starts, lengths in tokens.documents():
            yield starts, lengths
            progress.advance(int(lengths.sum()) * tokens.item_bytes)

    return pack_segments(
        split_documents(documents(), context, packing.stride, has_eos=tokens.eos_id is not None),
        context,
        packing.strategy,
    )


def _in_memory(tokens: TokenDataset, context: int, packing: Packing, progress: ByteProgress) -> _Table:
    segments: list[np.ndarray] = []
    ends = array("Q")
    for block, block_ends in _blocks(_rows_of(tokens, context, packing, progress)):
        segments.append(block)
        ends.extend(block_ends)
    return np.concatenate(segments) if segments else np.empty(0, SEGMENT), np.array(ends, dtype=np.uint64)


def _blocks(rows: Iterator[list[Segment]]) -> Iterator[tuple[np.ndarray, array[int]]]:
    """Rows as blocks of segments, with the end of each row among all segments."""
    held: list[Segment] = []
    ends, done = array("Q"), 0
    for row in rows:
        held += row
        ends.append(done + len(held))
        if len(held) >= _BUFFERED_SEGMENTS:
            yield np.array(held, dtype=SEGMENT), ends
            done += len(held)
            held, ends = [], array("Q")
    if held:
        yield np.array(held, dtype=SEGMENT), ends


def _in_files(tokens: TokenDataset, context: int, packing: Packing, progress: ByteProgress) -> _Table:
    key = f"{_VERSION} {tokens.fingerprint} {packing.strategy} {context} {packing.stride}"
    name = hashlib.sha256(key.encode()).hexdigest()[:24]
    index_folder = Path(tokens.source) / INDEX_FOLDER
    if (found := _open_table(index_folder / name)) is not None:
        return found
    with contextlib.suppress(OSError):  # the folder is read-only or the disk is full: use a temporary folder
        index_folder.mkdir(exist_ok=True)
        shutil.rmtree(index_folder / name, ignore_errors=True)  # incomplete, after a power failure
        staging = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=index_folder))
        try:
            _write_table(staging, _rows_of(tokens, context, packing, progress))
            with contextlib.suppress(OSError):  # another rank was first: its table is the same
                staging.rename(index_folder / name)
            if (found := _open_table(index_folder / name)) is not None:
                return found
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    # Mapped files stay readable after their names have been removed.
    with tempfile.TemporaryDirectory(prefix="llm-trainer-packing-") as folder:
        _write_table(Path(folder), _rows_of(tokens, context, packing, progress))
        found = _open_table(Path(folder))
    assert found is not None
    return found


def _write_table(folder: Path, rows: Iterator[list[Segment]]) -> None:
    with (folder / "pieces").open("wb") as segments, (folder / "ends").open("wb") as ends:
        for block, block_ends in _blocks(rows):
            segments.write(block.tobytes())
            ends.write(np.array(block_ends, dtype="<u8").tobytes())
        for opened in (segments, ends):
            _flush(opened)


def _flush(opened: BinaryIO) -> None:
    opened.flush()
    os.fsync(opened.fileno())


def _open_table(folder: Path) -> _Table | None:
    """The table in this folder, memory-mapped; None if it is missing or incomplete."""
    files = folder / "pieces", folder / "ends"
    if not all(file.is_file() and file.stat().st_size for file in files):
        return None
    segments = np.memmap(files[0], dtype=SEGMENT, mode="r").view(np.ndarray)
    ends = np.memmap(files[1], dtype=np.dtype("<u8"), mode="r").view(np.ndarray)
    return (segments, ends) if int(ends[-1]) == len(segments) else None
