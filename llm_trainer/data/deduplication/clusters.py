"""Which documents are the same, or nearly: groups of them from keys on disk, in memory of a stated size,
whatever the order of workers.

A document has a number (its place in the corpus) and keys: its content's hash for exact duplicates, one key a
band (`minhash`) for near ones. Two documents with an equal key in any column belong together, and groups are
the connected components of that relation, as in FineWeb: a and b may be alike, b and c too, and a and c less
so. The label of a group is the least number in it. Which documents are in a group follows from the keys
alone, so neither workers nor the order of files changes it.

Equal keys are found by sorting, one column and one range of the keys' values at a time, as many columns at
once as the memory holds; the keys are read from disk again for each. No text, no signature and no index of
all keys is in memory, but 4 bytes a document (its label) and the share that is being sorted: `sort_bytes`, or
3 bytes a document where that is more. Indexes of bands in memory, as datasketch and rensa keep them, have 14
entries a document, and reading keys again is the cheapest of all there is to do here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from llm_trainer.data.progress import ByteProgress
from llm_trainer.errors import DataError

Keys: TypeAlias = NDArray[np.uint64]
Labels: TypeAlias = NDArray[np.uint32]

LEFT_OUT = 255  # in an array of splits: this document is in none
SORT_BYTES = 32 * 2**20
_BYTES_A_KEY = 12  # while it waits: key and number
_BYTES_SORTED = 48  # while it is sorted: these, their order, and what sorting and comparing make of them
_RANGES = 16  # of values at most, so that time grows no faster than the number of documents
_ROWS_A_BLOCK = 2**13


@dataclass(frozen=True)
class KeyTable:
    """The keys of all documents: `blocks()` gives them in order, (rows, columns × width) at a time, the same
    on each call.

    A key is `width` neighbouring numbers; keys of different columns are not compared.
    """

    blocks: Callable[[], Iterator[Keys]]
    documents: int
    columns: int
    width: int = 1

    @classmethod
    def of_hashes(cls, blocks: Callable[[], Iterator[Keys]], documents: int) -> KeyTable:
        """One key a document: a hash of 16 bytes, as (rows, 2) of uint64."""
        return cls(blocks, documents, columns=1, width=2)

    @classmethod
    def of_files(cls, files: Sequence[Path], bands: int) -> KeyTable:
        """Band keys as `minhash.BandWriter` wrote them, documents numbered through the files in this order.

        Raises DataError for a file that ends inside a document's keys.
        """
        sizes = [file.stat().st_size for file in files]
        for file, size in zip(files, sizes, strict=True):
            if size % (8 * bands):
                raise DataError(
                    f"{file} is cut short: {size} bytes are no multiple of {8 * bands}; delete it to have it made again"
                )

        def blocks() -> Iterator[Keys]:
            for file in files:
                with file.open("rb") as opened:
                    while raw := opened.read(_ROWS_A_BLOCK * 8 * bands):
                        yield np.frombuffer(raw, "<u8").reshape(-1, bands)

        return cls(blocks, sum(sizes) // (8 * bands), bands)


def near_duplicate_clusters(
    files: Sequence[Path], bands: int, *, console: Console | None = None, sort_bytes: int = SORT_BYTES
) -> Labels:
    """For each document of these files of band keys the least number in its group; one without
    near-duplicates has its own.
    """
    return find_clusters(
        KeyTable.of_files(files, bands), "finding near-duplicates", console=console, sort_bytes=sort_bytes
    )


def exact_duplicate_clusters(
    hashes: Callable[[], Iterator[Keys]],
    documents: int,
    *,
    console: Console | None = None,
    sort_bytes: int = SORT_BYTES,
) -> Labels:
    """For each document the least number among those with the same hash of 16 bytes; `hashes()` gives blocks
    of (rows, 2).
    """
    return find_clusters(
        KeyTable.of_hashes(hashes, documents), "finding duplicates", console=console, sort_bytes=sort_bytes
    )


def find_clusters(
    table: KeyTable, what: str, *, console: Console | None = None, sort_bytes: int = SORT_BYTES
) -> Labels:
    """(documents,) the label of each document's group: the least number in it."""
    if table.documents >= 2**32:
        raise DataError(
            f"{table.documents} documents are too many to deduplicate at once; prepare them in parts of fewer than 2^32"
        )
    parents = np.arange(table.documents, dtype=np.uint32)
    for numbers, is_same in _runs(table, None, what, console, sort_bytes):
        pairs = np.flatnonzero(is_same)
        if pairs.size:
            _join(parents, numbers[pairs], numbers[pairs + 1])
    return parents


def count_leaked_documents(
    table: KeyTable,
    splits: NDArray[np.uint8],
    *,
    console: Console | None = None,
    sort_bytes: int = SORT_BYTES,
) -> int:
    """How many held-out documents have a key in common with a document of another split.

    `splits` has each document's: 0 for training, other numbers for what is held out, LEFT_OUT for what was dropped. Zero where
    deduplication and split did their work; this looks at the keys themselves and at where documents went, not at groups.
    """
    assert splits.shape == (table.documents,), f"{splits.shape} splits for {table.documents} documents"
    leaks = np.zeros(table.documents, np.bool_)
    for numbers, is_same in _runs(table, splits != LEFT_OUT, "looking for leaks", console, sort_bytes):
        if not numbers.size:
            continue
        begins = np.flatnonzero(np.append(True, ~is_same))
        own = splits[numbers]
        is_mixed = np.minimum.reduceat(own, begins) != np.maximum.reduceat(own, begins)
        leaks[numbers[np.repeat(is_mixed, np.diff(np.append(begins, numbers.size)))]] = True
    return int(np.count_nonzero(leaks & (splits != 0)))


def _runs(
    table: KeyTable, is_in: NDArray[np.bool_] | None, what: str, console: Console | None, sort_bytes: int
) -> Iterator[tuple[Labels, NDArray[np.bool_]]]:
    """For each column, and range of values in it: document numbers with equal keys side by side, and whether
    each equals the next.

    So many columns are held at once as fit into `sort_bytes`; where not even one does, the keys' highest bits
    divide it.
    """
    room = sort_bytes / (max(1, table.documents) * table.width)  # bytes for each document
    bits = (min(max(1, math.ceil(_BYTES_SORTED / room)), _RANGES) - 1).bit_length()
    at_once = max(1, 1 + int((room - _BYTES_SORTED) // _BYTES_A_KEY))
    passes = [(first, part) for first in range(0, table.columns, at_once) for part in range(1 << bits)]
    size = 8 * table.documents * table.columns * table.width
    with ByteProgress(console, what, size * len(passes)) as progress:
        for first, part in passes:
            columns = range(first, min(first + at_once, table.columns))
            yield from _sorted_pass(table, columns, bits, part, is_in, progress)


def _sorted_pass(
    table: KeyTable,
    columns: range,
    bits: int,
    part: int,
    is_in: NDArray[np.bool_] | None,
    progress: ByteProgress,
) -> Iterator[tuple[Labels, NDArray[np.bool_]]]:
    keys: list[list[Keys]] = [[] for _ in columns]
    numbers: list[list[Labels]] = [[] for _ in columns]
    begin = 0
    for block in table.blocks():
        here = np.arange(begin, begin + len(block), dtype=np.uint32)
        chosen = None if is_in is None else is_in[begin : begin + len(block)]
        for place, column in enumerate(columns):
            own = block[:, column * table.width : (column + 1) * table.width]
            wanted = chosen
            if bits:
                in_range = (own[:, 0] >> np.uint64(64 - bits)) == part
                wanted = in_range if chosen is None else in_range & chosen
            keys[place].append(own.copy() if wanted is None else own[wanted])
            numbers[place].append(here if wanted is None else here[wanted])
        begin += len(block)
        progress.advance(block.nbytes)
    assert begin == table.documents, f"{begin} keys for {table.documents} documents"
    for place in range(len(columns)):
        if keys[place]:
            yield _sorted(np.concatenate(keys[place]), np.concatenate(numbers[place]))
        keys[place], numbers[place] = [], []


def _sorted(keys: Keys, numbers: Labels) -> tuple[Labels, NDArray[np.bool_]]:
    order = np.argsort(keys[:, 0]) if keys.shape[1] == 1 else np.lexsort(keys.T[::-1])
    keys = keys[order]
    return numbers[order], (keys[1:] == keys[:-1]).all(axis=1)


def _join(parents: Labels, left: Labels, right: Labels) -> None:
    """Unite the groups of each pair, in place: roots hang on smaller ones until no pair's differ, then all
    hang on their roots.
    """
    while left.size:
        left, right = _roots(parents, left), _roots(parents, right)
        differ = left != right
        left, right = left[differ], right[differ]
        np.minimum.at(parents, np.maximum(left, right), np.minimum(left, right))
    for begin in range(
        0, parents.size, _ROWS_A_BLOCK
    ):  # what is above stands before, and so hangs on its root by now
        block = parents[begin : begin + _ROWS_A_BLOCK]
        block[:] = _roots(parents, block)


def _roots(parents: Labels, nodes: Labels) -> Labels:
    while True:
        above = parents[nodes]
        if np.array_equal(above, nodes):
            return nodes
        nodes = above
