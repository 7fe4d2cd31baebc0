"""Rows of whole documents: the table of what lies in which row, and the samples made of it.

The table is computed once from the lengths of the documents (`packing.py`) and then row i is found in O(1).
It has 17 bytes a piece and 8 a row. Small ones are kept in memory; one of more than a million pieces is
written as it is made and memory-mapped, so that memory stays flat: in the folder `.packing` beside the
shards, where the next run, and the other ranks of this one, find it, or, where that cannot be written, in a
temporary folder. Its name holds all that it follows from, so a table is never stale.
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

from llm_trainer.data.progress import ByteProgress
from llm_trainer.data.sampling.batch import IGNORED, Batch, sources_at
from llm_trainer.data.sampling.packing import PIECE, Packing, PieceFields, cut_documents, pack
from llm_trainer.data.sampling.permutation import KeyedPermutation, combine
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.errors import DataError

INDEX_FOLDER = ".packing"
IN_MEMORY_PIECES = 2**20
_VERSION = 1  # of what `pack` makes of the same documents
_BUFFERED = 2**16


class PackedRows:
    """The rows of a stream under `first_fit` or `none`. `count` rows of `context` places; `supervised` labels
    in all of them.

    Making the table of a large corpus is shown on `console`. Raises UsageError where the overlap is as long
    as a row.
    """

    def __init__(
        self, tokens: TokenDataset, context: int, packing: Packing, console: Console | None = None
    ) -> None:
        self._tokens, self._context = tokens, context
        packing.step(context)
        self._masked = packing.mask_documents and packing.strategy == "first_fit"
        self._pieces, self._ends = _table(tokens, context, packing, console)
        self.count = len(self._ends)
        self.supervised = tokens.num_tokens - (tokens.num_documents if tokens.end_id is None else 0)

    def rows(self, numbers: np.ndarray, rows: int | None = None) -> Batch:
        """The rows of these numbers, and rows without labels up to `rows`. Places that hold nothing are
        supervised nowhere.
        """
        shape = (len(numbers) if rows is None else rows, self._context)
        inputs, documents, places = (np.zeros(shape, dtype=np.int64) for _ in range(3))
        labels = np.full(shape, IGNORED, dtype=np.int64)
        for row, number in enumerate(numbers.tolist()):
            self._fill(number, inputs[row], labels[row], documents[row], places[row])
        found = torch.from_numpy(documents) if self._masked else None
        supervised, sources = int((labels != IGNORED).sum()), sources_at(self._tokens, places)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(labels), found, supervised, sources)

    def _fill(
        self, number: int, inputs: np.ndarray, labels: np.ndarray, documents: np.ndarray, places: np.ndarray
    ) -> None:
        begin = int(self._ends[number - 1]) if number else 0
        place = 0
        for document, (first, count, overlap, opens) in enumerate(
            self._pieces[begin : int(self._ends[number])].tolist()
        ):
            sequence = np.empty(count + 1, dtype=np.int64)
            if opens:
                sequence[0] = self._tokens.end_id
            self._tokens.read_into(first - (not opens), sequence[opens:])
            inputs[place : place + count], labels[place : place + count] = sequence[:-1], sequence[1:]
            labels[place : place + overlap] = IGNORED
            documents[place : place + count], places[place : place + count] = (
                document,
                np.arange(first, first + count),
            )
            place += count
            documents[place:] = document + 1


class RowSampler:
    """The training order over packed rows: the same rows in every epoch, in another order. Raises DataError
    where there are none.
    """

    def __init__(
        self, tokens: TokenDataset, context: int, seed: int, packing: Packing, console: Console | None = None
    ) -> None:
        self._rows, self.seed, self.order = PackedRows(tokens, context, packing, console), seed, str(packing)
        if not self._rows.count or self._rows.supervised < 1:
            raise DataError(
                f"{tokens.source} gives {tokens.num_tokens} training tokens, nothing to predict; give more text"
            )
        self.samples_per_epoch = self._rows.count
        self.tokens_per_sample = self._rows.supervised / self._rows.count
        self._orders: dict[int, KeyedPermutation] = {}

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples `first_sample … first_sample + count - 1` as one batch of `count` rows."""
        return self._rows.rows(self.row_numbers(np.arange(first_sample, first_sample + count)))

    def row_numbers(self, samples: np.ndarray) -> np.ndarray:
        """Which row each of these samples is, int64 of the same shape."""
        epochs, places = np.divmod(np.asarray(samples, dtype=np.int64), self.samples_per_epoch)
        found = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            found[chosen] = self._order(epoch)(places[chosen])
        return found

    def _order(self, epoch: int) -> KeyedPermutation:
        order = self._orders.get(epoch)
        if order is None:
            order = KeyedPermutation(self.samples_per_epoch, combine(self.seed, epoch))
            self._orders = {epoch: order}
        return order


_Table = tuple[np.ndarray, np.ndarray]  # pieces (PIECE), and where in them each row ends (uint64)


def _table(tokens: TokenDataset, context: int, packing: Packing, console: Console | None) -> _Table:
    """The table of a stream: remembered, found beside the shards, or made."""
    key = (context, packing.strategy, packing.stride)
    if key not in tokens.packed:
        at_most = tokens.num_documents + tokens.num_tokens // packing.step(context)
        with ByteProgress(
            console, f"laying out rows ({packing})", tokens.num_tokens * tokens.item_bytes
        ) as progress:
            make = _in_files if at_most > IN_MEMORY_PIECES else _in_memory
            tokens.packed[key] = make(tokens, context, packing, progress)
    return tokens.packed[key]


def _rows_of(
    tokens: TokenDataset, context: int, packing: Packing, progress: ByteProgress
) -> Iterator[list[PieceFields]]:
    def documents() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for starts, lengths in tokens.documents():
            yield starts, lengths
            progress.advance(int(lengths.sum()) * tokens.item_bytes)

    return pack(
        cut_documents(documents(), context, packing.stride, has_end=tokens.end_id is not None),
        context,
        packing.strategy,
    )


def _in_memory(tokens: TokenDataset, context: int, packing: Packing, progress: ByteProgress) -> _Table:
    pieces: list[np.ndarray] = []
    ends = array("Q")
    for block, block_ends in _blocks(_rows_of(tokens, context, packing, progress)):
        pieces.append(block)
        ends.extend(block_ends)
    return np.concatenate(pieces) if pieces else np.empty(0, PIECE), np.array(ends, dtype=np.uint64)


def _blocks(rows: Iterator[list[PieceFields]]) -> Iterator[tuple[np.ndarray, array[int]]]:
    """Rows as blocks of pieces and where each row ends among all pieces."""
    held: list[PieceFields] = []
    ends, done = array("Q"), 0
    for row in rows:
        held += row
        ends.append(done + len(held))
        if len(held) >= _BUFFERED:
            yield np.array(held, dtype=PIECE), ends
            done += len(held)
            held, ends = [], array("Q")
    if held:
        yield np.array(held, dtype=PIECE), ends


def _in_files(tokens: TokenDataset, context: int, packing: Packing, progress: ByteProgress) -> _Table:
    said = f"{_VERSION} {tokens.fingerprint} {packing.strategy} {context} {packing.stride}"
    name = hashlib.sha256(said.encode()).hexdigest()[:24]
    place = Path(tokens.source) / INDEX_FOLDER
    if (found := _open_table(place / name)) is not None:
        return found
    with contextlib.suppress(
        OSError
    ):  # a folder that cannot be written, or a full disk: then a temporary one
        place.mkdir(exist_ok=True)
        shutil.rmtree(place / name, ignore_errors=True)  # a torn one, after a power failure
        workplace = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=place))
        try:
            _write_table(workplace, _rows_of(tokens, context, packing, progress))
            with contextlib.suppress(OSError):  # another rank was first: its table is the same
                workplace.rename(place / name)
            if (found := _open_table(place / name)) is not None:
                return found
        finally:
            shutil.rmtree(workplace, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        prefix="llm-trainer-packing-"
    ) as folder:  # mapped files live on when their names are gone
        _write_table(Path(folder), _rows_of(tokens, context, packing, progress))
        found = _open_table(Path(folder))
    assert found is not None
    return found


def _write_table(folder: Path, rows: Iterator[list[PieceFields]]) -> None:
    with (folder / "pieces").open("wb") as pieces, (folder / "ends").open("wb") as ends:
        for block, block_ends in _blocks(rows):
            pieces.write(block.tobytes())
            ends.write(np.array(block_ends, dtype="<u8").tobytes())
        for opened in (pieces, ends):
            _flush(opened)


def _flush(opened: BinaryIO) -> None:
    opened.flush()
    os.fsync(opened.fileno())


def _open_table(folder: Path) -> _Table | None:
    """A whole table in this folder, mapped."""
    files = folder / "pieces", folder / "ends"
    if not all(file.is_file() and file.stat().st_size for file in files):
        return None
    pieces = np.memmap(files[0], dtype=PIECE, mode="r").view(np.ndarray)
    ends = np.memmap(files[1], dtype=np.dtype("<u8"), mode="r").view(np.ndarray)
    return (pieces, ends) if int(ends[-1]) == len(pieces) else None
