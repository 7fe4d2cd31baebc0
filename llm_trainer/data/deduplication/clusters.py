"""Clusters of equal or nearly equal documents, from keys on disk, in bounded memory.

A document has a number (its position in the corpus) and keys: the hash of its contents for exact duplicates,
one key per band (`minhash`) for near-duplicates. Two documents with an equal key in any column are in one
cluster, and clusters are the connected components of that relation, as in FineWeb: a may be like b, and b
like c, and a less like c. The label of a cluster is the least number in it. The clusters depend on the keys
alone, so neither the order of workers nor that of files changes them.

Equal keys are found by sorting, one column and one range of the keys' values at a time, or several columns at
once if memory allows; the keys are read from disk again for each pass. No text, no signature and no index of
all keys is in memory, only 4 bytes per document (its label) and the part that is being sorted: `sort_bytes`,
or 3 bytes per document if that is more. Indexes of bands in memory, as in datasketch and rensa, have 14
entries per document, and reading the keys again is the cheapest step of deduplication.
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

EXCLUDED = 255
"""In an array of splits: the document is in no split."""
SORT_BYTES = 32 * 2**20
_UNSORTED_KEY_BYTES = 12  # per key before it is sorted: key and number
_SORTED_KEY_BYTES = 48  # per key while it is sorted: these, their order, and temporary arrays
_MAX_RANGES = 16  # of values, so that time grows no faster than the number of documents
_ROWS_PER_BLOCK = 2**13


@dataclass(frozen=True)
class KeyTable:
    """The keys of all documents.

    Attributes:
        blocks: Yields the keys in order, as arrays of shape (rows, columns × width), the same on each call.
        documents: The number of documents.
        columns: Keys per document; keys of different columns are not compared.
        width: Numbers per key.
    """

    blocks: Callable[[], Iterator[Keys]]
    documents: int
    columns: int
    width: int = 1

    @classmethod
    def from_hashes(cls, blocks: Callable[[], Iterator[Keys]], documents: int) -> KeyTable:
        """Build a table of one 16-byte hash per document, from uint64 blocks of shape (rows, 2)."""
        return cls(blocks, documents, columns=1, width=2)

    @classmethod
    def from_files(cls, files: Sequence[Path], bands: int) -> KeyTable:
        """Build a table of the band keys that `minhash.BandKeyWriter` wrote.

        Args:
            files: The files; documents are numbered through them in this order.
            bands: Keys per document.

        Raises:
            DataError: A file is truncated.
        """
        sizes = [file.stat().st_size for file in files]
        for file, size in zip(files, sizes, strict=True):
            if size % (8 * bands):
                raise DataError(
                    f"{file} is truncated: its {size} bytes are not a multiple of {8 * bands}; delete it and "
                    "run the command again, which rebuilds it"
                )

        def blocks() -> Iterator[Keys]:
            for file in files:
                with file.open("rb") as opened:
                    while raw := opened.read(_ROWS_PER_BLOCK * 8 * bands):
                        yield np.frombuffer(raw, "<u8").reshape(-1, bands)

        return cls(blocks, sum(sizes) // (8 * bands), bands)


def near_duplicate_clusters(
    files: Sequence[Path], bands: int, *, console: Console | None = None, sort_bytes: int = SORT_BYTES
) -> Labels:
    """Find near-duplicates by their band keys.

    Args:
        files: Files of band keys.
        bands: Keys per document.
        console: Where progress is shown.
        sort_bytes: About how much memory sorting may use.

    Returns:
        For each document the least number in its cluster, which is its own if it has no near-duplicate.
    """
    return find_clusters(
        KeyTable.from_files(files, bands), "finding near-duplicates", console=console, sort_bytes=sort_bytes
    )


def exact_duplicate_clusters(
    hashes: Callable[[], Iterator[Keys]],
    documents: int,
    *,
    console: Console | None = None,
    sort_bytes: int = SORT_BYTES,
) -> Labels:
    """Find documents with equal contents by their hashes.

    Args:
        hashes: Yields hashes of 16 bytes, as uint64 arrays of shape (rows, 2).
        documents: The number of documents.
        console: Where progress is shown.
        sort_bytes: About how much memory sorting may use.

    Returns:
        For each document the least number among those with the same hash.
    """
    return find_clusters(
        KeyTable.from_hashes(hashes, documents), "finding duplicates", console=console, sort_bytes=sort_bytes
    )


def find_clusters(
    table: KeyTable, description: str, *, console: Console | None = None, sort_bytes: int = SORT_BYTES
) -> Labels:
    """Find the connected components of documents with an equal key in any column.

    Args:
        table: The keys.
        description: What is done, for the progress bar.
        console: Where progress is shown.
        sort_bytes: About how much memory sorting may use.

    Returns:
        The least number in each document's cluster, of shape (documents,).

    Raises:
        DataError: There are 2^32 documents or more.
    """
    if table.documents >= 2**32:
        raise DataError(
            f"{table.documents} documents are too many to deduplicate at once; prepare them in parts of "
            "fewer than 2^32 documents"
        )
    parents = np.arange(table.documents, dtype=np.uint32)
    for numbers, is_same in _runs(table, None, description, console, sort_bytes):
        pairs = np.flatnonzero(is_same)
        if pairs.size:
            _merge_clusters(parents, numbers[pairs], numbers[pairs + 1])
    return parents


def count_leaked_documents(
    table: KeyTable,
    splits: NDArray[np.uint8],
    *,
    console: Console | None = None,
    sort_bytes: int = SORT_BYTES,
) -> int:
    """Count held-out documents that have a key in common with a document of another split.

    The count is zero if deduplication and splitting worked. It is computed from the keys themselves and the
    documents' final splits, not from clusters.

    Args:
        table: The keys.
        splits: Each document's split: 0 for training, other numbers for held-out splits, EXCLUDED for none.
        console: Where progress is shown.
        sort_bytes: About how much memory sorting may use.
    """
    assert splits.shape == (table.documents,), f"{splits.shape} splits for {table.documents} documents"
    leaks = np.zeros(table.documents, np.bool_)
    for numbers, is_same in _runs(table, splits != EXCLUDED, "looking for leakage", console, sort_bytes):
        if not numbers.size:
            continue
        begins = np.flatnonzero(np.append(True, ~is_same))
        own = splits[numbers]
        is_mixed = np.minimum.reduceat(own, begins) != np.maximum.reduceat(own, begins)
        leaks[numbers[np.repeat(is_mixed, np.diff(np.append(begins, numbers.size)))]] = True
    return int(np.count_nonzero(leaks & (splits != 0)))


def _runs(
    table: KeyTable,
    is_included: NDArray[np.bool_] | None,
    description: str,
    console: Console | None,
    sort_bytes: int,
) -> Iterator[tuple[Labels, NDArray[np.bool_]]]:
    """For each column and range of values: document numbers sorted by key, and whether each key equals the
    next.

    As many columns are sorted at once as fit into `sort_bytes`; if not even one does, the keys' highest bits
    divide it.
    """
    bytes_per_key = sort_bytes / (max(1, table.documents) * table.width)
    bits = (min(max(1, math.ceil(_SORTED_KEY_BYTES / bytes_per_key)), _MAX_RANGES) - 1).bit_length()
    columns_at_once = max(1, 1 + int((bytes_per_key - _SORTED_KEY_BYTES) // _UNSORTED_KEY_BYTES))
    passes = [
        (first, part) for first in range(0, table.columns, columns_at_once) for part in range(1 << bits)
    ]
    size = 8 * table.documents * table.columns * table.width
    with ByteProgress(console, description, size * len(passes)) as progress:
        for first, part in passes:
            columns = range(first, min(first + columns_at_once, table.columns))
            yield from _sorted_pass(table, columns, bits, part, is_included, progress)


def _sorted_pass(
    table: KeyTable,
    columns: range,
    bits: int,
    part: int,
    is_included: NDArray[np.bool_] | None,
    progress: ByteProgress,
) -> Iterator[tuple[Labels, NDArray[np.bool_]]]:
    keys: list[list[Keys]] = [[] for _ in columns]
    numbers: list[list[Labels]] = [[] for _ in columns]
    begin = 0
    for block in table.blocks():
        here = np.arange(begin, begin + len(block), dtype=np.uint32)
        included = None if is_included is None else is_included[begin : begin + len(block)]
        for index, column in enumerate(columns):
            own = block[:, column * table.width : (column + 1) * table.width]
            selected = included
            if bits:
                is_in_range = (own[:, 0] >> np.uint64(64 - bits)) == part
                selected = is_in_range if included is None else is_in_range & included
            keys[index].append(own.copy() if selected is None else own[selected])
            numbers[index].append(here if selected is None else here[selected])
        begin += len(block)
        progress.advance(block.nbytes)
    assert begin == table.documents, f"{begin} keys for {table.documents} documents"
    for index in range(len(columns)):
        if keys[index]:
            yield _sorted(np.concatenate(keys[index]), np.concatenate(numbers[index]))
        keys[index], numbers[index] = [], []


def _sorted(keys: Keys, numbers: Labels) -> tuple[Labels, NDArray[np.bool_]]:
    order = np.argsort(keys[:, 0]) if keys.shape[1] == 1 else np.lexsort(keys.T[::-1])
    keys = keys[order]
    return numbers[order], (keys[1:] == keys[:-1]).all(axis=1)


def _merge_clusters(parents: Labels, left: Labels, right: Labels) -> None:
    """Unite the clusters of each pair, in place (union-find with path compression).

    Larger roots are attached to smaller ones until the roots of every pair are equal; then each document is
    attached to its root.
    """
    while left.size:
        left, right = _roots(parents, left), _roots(parents, right)
        differ = left != right
        left, right = left[differ], right[differ]
        np.minimum.at(parents, np.maximum(left, right), np.minimum(left, right))
    # A parent has a smaller number, so that by then it is attached to its root.
    for begin in range(0, parents.size, _ROWS_PER_BLOCK):
        block = parents[begin : begin + _ROWS_PER_BLOCK]
        block[:] = _roots(parents, block)


def _roots(parents: Labels, nodes: Labels) -> Labels:
    while True:
        next_nodes = parents[nodes]
        if np.array_equal(next_nodes, nodes):
            return nodes
        nodes = next_nodes
