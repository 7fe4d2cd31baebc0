"""Stage 2, `deduplicate`: which documents say again what an earlier one says.

Exact duplicates have the same hash of the cleaned text, near ones agree in a band of their MinHash signatures
(`deduplication/groups.py` finds both). Of each group the first document in reading order is kept: documents
that are added after it do not replace it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from llm_trainer.data.deduplication.clusters import KeyTable, exact_groups, leak_count, near_duplicate_groups
from llm_trainer.data.deduplication.minhash import MinHasher
from llm_trainer.data.pipeline.document_index import BANDS_FILE, UnitTable

KEPT, EXACT, NEAR, REJECTED = range(4)
REASONS = {EXACT: "exact duplicate", NEAR: "near duplicate"}
DUPLICATES_FILE = "duplicates.npy"
SORT_BYTES = 32 * 2**20  # for the search; beside it, memory grows by some bytes a document


def kept_only(tables: Sequence[UnitTable]) -> np.ndarray:
    """Each document's state before anything is compared: `KEPT` or `REJECTED`, uint8 `(documents,)` over all
    tables.
    """
    states = [np.where(table.rows()["kept"] == 1, KEPT, REJECTED).astype(np.uint8) for table in tables]
    return np.concatenate(states) if states else np.empty(0, np.uint8)


def mark_exact(tables: Sequence[UnitTable], states: np.ndarray, console: Console | None) -> None:
    """Set to `EXACT` what repeats an earlier document."""
    hashes, documents = functools.partial(_kept_hashes, tables), int((states != REJECTED).sum())
    _mark(states, exact_groups(hashes, documents, console=console, sort_bytes=SORT_BYTES), EXACT)


def mark_near(
    tables: Sequence[UnitTable], states: np.ndarray, hasher: MinHasher, console: Console | None
) -> None:
    """Set to `NEAR` what is near to an earlier document and not equal to one."""
    files = [table.folder / BANDS_FILE for table in tables]
    _mark(states, near_duplicate_groups(files, hasher.bands, console=console, sort_bytes=SORT_BYTES), NEAR)


def count_leaks(
    tables: Sequence[UnitTable],
    states: np.ndarray,
    codes: np.ndarray,
    hasher: MinHasher | None,
    console: Console | None,
) -> int:
    """Held-out documents that have an equal (with `hasher` a near one) in another split; `codes`
    `(documents,)` are all units' plans.
    """
    if hasher is not None:
        keys = KeyTable.of_files([table.folder / BANDS_FILE for table in tables], hasher.bands)
    else:
        keys = KeyTable.of_hashes(functools.partial(_kept_hashes, tables), int((states != REJECTED).sum()))
    return leak_count(keys, codes[states != REJECTED], console=console, sort_bytes=SORT_BYTES)


def _kept_hashes(tables: Sequence[UnitTable]) -> Iterator[np.ndarray]:
    for table in tables:
        rows = table.rows()
        yield rows["hash"][rows["kept"] == 1]


def _mark(states: np.ndarray, groups: np.ndarray, state: int) -> None:
    """Mark the kept documents that are not the first of their group; groups number the documents that stage 1
    kept, `(n,)`.
    """
    places = np.flatnonzero(states != REJECTED)
    repeats = places[groups != np.arange(len(groups))]
    states[repeats[states[repeats] == KEPT]] = state


def load_states(folder: Path) -> np.ndarray:
    """What the stage wrote."""
    states: np.ndarray = np.load(folder / DUPLICATES_FILE, allow_pickle=False)
    return states
