"""The corpus after stage 3: each unit with what becomes of its documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import JsonValue

from llm_trainer.data.cleaning.cleaner import Cleaning
from llm_trainer.data.pipeline.deduplicate import KEPT
from llm_trainer.data.pipeline.document_index import NO_SPLIT, SPLITS, UnitTable, read_again
from llm_trainer.data.pipeline.splits import (
    BY_HASH,
    CONTIGUOUS,
    GIVEN,
    Part,
    Shares,
    UnitPlan,
    parts_of,
    plan_by_hash,
    plan_contiguous,
)


@dataclass(frozen=True)
class PlannedUnit:
    """A unit, and what becomes of its documents. `size` is the bytes of those that are kept."""

    table: UnitTable
    cleaning: Cleaning
    plan: UnitPlan
    size: int

    @property
    def name(self) -> str:
        """The unit's."""
        return self.table.unit.name

    @property
    def inputs(self) -> list[JsonValue]:
        """What a key of anything made of the unit's text depends on."""
        cuts: dict[str, JsonValue] = {
            str(row): [list(cut) for cut in cuts] for row, cuts in self.plan.cuts.items()
        }
        return [self.table.key, hashlib.sha256(self.plan.codes).hexdigest(), cuts]

    def parts(self, is_wanted: bytes) -> Iterator[Part]:
        """The text of the wanted documents, each piece with its split."""
        return parts_of(self.plan, read_again(self.table.unit, self.cleaning, is_wanted))


@dataclass(frozen=True)
class Corpus:
    """All units, planned. `states` are stage 2's, uint8 `(documents,)`; `method` is in words; `splits` are
    those that there will be.
    """

    units: list[PlannedUnit]
    states: np.ndarray
    method: str
    splits: list[str]
    training_bytes: int

    @property
    def codes(self) -> np.ndarray:
        """Each document's split, or LEFT_OUT: uint8 `(documents,)` over all units."""
        return np.frombuffer(b"".join(unit.plan.codes for unit in self.units), dtype=np.uint8)

    def states_of_units(self) -> Iterator[bytes]:
        """Each unit's part of `states`."""
        first = 0
        for unit in self.units:
            last = first + len(unit.plan.codes)
            yield self.states[first:last].tobytes()
            first = last


def plan_corpus(
    tables: Sequence[UnitTable], states: np.ndarray, cleaning: Cleaning, shares: Shares, seed: int
) -> Corpus:
    """Decide every kept document's split: as its source says, else by hash, else, with too few documents for
    that, by its place.
    """
    given = {
        SPLITS[code]
        for table in tables
        for code in np.unique(table.rows()["split"]).tolist()
        if code != NO_SPLIT
    }
    is_by_hash = bool(given) or shares.can_split_by_hash(int((states == KEPT).sum()))
    sizes = [int(table.rows()["size"][own].sum()) for table, own in _with_kept(tables, states)]
    edges, start, training = shares.boundaries(sum(sizes)), 0, 0
    units = []
    for (table, own), size in zip(_with_kept(tables, states), sizes, strict=True):
        rows = table.rows()
        if is_by_hash:
            plan = plan_by_hash(rows["hash"], rows["split"], own, shares, seed)
            training += int(
                rows["size"][np.frombuffer(plan.codes, dtype=np.uint8) == SPLITS.index("train")].sum()
            )
        else:
            plan = plan_contiguous(rows["size"], own, start, edges)
        units.append(PlannedUnit(table, cleaning, plan, size))
        start += size
    method = GIVEN if given else BY_HASH if is_by_hash else CONTIGUOUS
    wanted = {"train": True, "validation": shares.validation > 0, "test": shares.test > 0}
    splits = [split for split in SPLITS if split == "train" or (split in given if given else wanted[split])]
    return Corpus(units, states, method, splits, training if is_by_hash else edges[0])


def _with_kept(tables: Sequence[UnitTable], states: np.ndarray) -> Iterator[tuple[UnitTable, np.ndarray]]:
    """Each table, and which of its documents are kept: bool `(documents,)`."""
    first = 0
    for table in tables:
        last = first + len(table.rows())
        yield table, states[first:last] == KEPT
        first = last
