"""Stage 2, `deduplicate`: finds documents that repeat an earlier one.

Exact duplicates have the same hash of the cleaned text; near-duplicates agree in a band of their MinHash
signatures (`deduplication/clusters.py` finds both). The first document of each cluster in reading order is
kept, so documents that are added later never replace it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from llm_trainer.data.deduplication.clusters import (
    KeyTable,
    count_leaked_documents,
    exact_duplicate_clusters,
    near_duplicate_clusters,
)
from llm_trainer.data.deduplication.minhash import MinHasher
from llm_trainer.data.pipeline.document_index import BANDS_FILE, DocumentIndex

KEPT, EXACT, NEAR, REJECTED = range(4)
REASONS = {EXACT: "exact duplicate", NEAR: "near duplicate"}
DUPLICATES_FILE = "duplicates.npy"
SORT_BYTES = 32 * 2**20  # for the search; in addition, memory grows by a few bytes per document


def initial_states(indexes: Sequence[DocumentIndex]) -> np.ndarray:
    """The state of each document before deduplication: `KEPT` or `REJECTED`.

    Returns:
        uint8 `(documents,)` over all partitions.
    """
    states = [np.where(index.rows()["kept"] == 1, KEPT, REJECTED).astype(np.uint8) for index in indexes]
    return np.concatenate(states) if states else np.empty(0, np.uint8)


def mark_exact_duplicates(
    indexes: Sequence[DocumentIndex], states: np.ndarray, console: Console | None
) -> None:
    """Set `states` to `EXACT` for documents that equal an earlier one."""
    hashes, documents = functools.partial(_kept_hashes, indexes), int((states != REJECTED).sum())
    clusters = exact_duplicate_clusters(hashes, documents, console=console, sort_bytes=SORT_BYTES)
    _mark(states, clusters, EXACT)


def mark_near_duplicates(
    indexes: Sequence[DocumentIndex], states: np.ndarray, hasher: MinHasher, console: Console | None
) -> None:
    """Set `states` to `NEAR` for documents that nearly equal an earlier one and are not marked yet."""
    files = [index.folder / BANDS_FILE for index in indexes]
    clusters = near_duplicate_clusters(files, hasher.bands, console=console, sort_bytes=SORT_BYTES)
    _mark(states, clusters, NEAR)


def count_leaks(
    indexes: Sequence[DocumentIndex],
    states: np.ndarray,
    codes: np.ndarray,
    hasher: MinHasher | None,
    console: Console | None,
) -> int:
    """Count held-out documents that also occur in another split.

    Args:
        indexes: The documents.
        states: Their states, uint8 `(documents,)`.
        codes: Their splits, uint8 `(documents,)`.
        hasher: Compares for near equality; None compares for equality.
        console: Shows progress.
    """
    if hasher is not None:
        keys = KeyTable.from_files([index.folder / BANDS_FILE for index in indexes], hasher.bands)
    else:
        keys = KeyTable.from_hashes(functools.partial(_kept_hashes, indexes), int((states != REJECTED).sum()))
    return count_leaked_documents(keys, codes[states != REJECTED], console=console, sort_bytes=SORT_BYTES)


def _kept_hashes(indexes: Sequence[DocumentIndex]) -> Iterator[np.ndarray]:
    for index in indexes:
        rows = index.rows()
        yield rows["hash"][rows["kept"] == 1]


def _mark(states: np.ndarray, clusters: np.ndarray, state: int) -> None:
    """Mark the kept documents that are not the first of their cluster.

    `clusters` `(n,)` has the first document of each document's cluster, counted over those that stage 1 kept.
    """
    documents = np.flatnonzero(states != REJECTED)
    repeats = documents[clusters != np.arange(len(clusters))]
    states[repeats[states[repeats] == KEPT]] = state


def load_states(folder: Path) -> np.ndarray:
    """Load the result of the stage, uint8 `(documents,)`."""
    states: np.ndarray = np.load(folder / DUPLICATES_FILE, allow_pickle=False)
    return states
