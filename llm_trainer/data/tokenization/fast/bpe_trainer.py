"""Byte pair encoding's merges from counted words, in numpy: the tokenizers library's own order of merges at a
fraction of its memory.

Training merges, again and again, the most frequent pair of neighbouring symbols (of equal ones that with the
smaller ids). The library keeps for each pair the set of all words that hold it, about a kilobyte a word. Most
pairs are far too rare ever to be merged. Here the symbols of all words lie in a few flat arrays, 16 bytes a
symbol, and places are kept only for pairs that occur at least `_floor` times; when no such pair is left, the
floor is lowered and the pairs are counted afresh. A pair that is not tracked is rarer than the floor, so the
most frequent of the tracked ones is the most frequent of all.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import numpy as np

_LOWER_BY = 8
_BLOCK = 2**20
_BUCKETS = 2**20


def learn_merges(
    symbols: np.ndarray,
    lengths: np.ndarray,
    counts: np.ndarray,
    names: list[str],
    vocab_size: int,
    joined: Callable[[str, str], str],
) -> list[tuple[str, str]]:
    """Merge until there are `vocab_size` names or no pair is left; returns the merges in order and extends
    `names`.

    `symbols` are the words' ids one after the other, int32 `(symbols,)`; `lengths` and `counts`, int64 `(words,)`, say how many belong to
    each word and how often it occurred. `names[i]` is the token of id i; `joined` makes the name of a merge.
    """
    return _Merging(symbols, lengths, counts, names, vocab_size, joined).run()


class _Merging:
    """Symbols as a linked list in flat arrays (-1: no neighbour, or, as a symbol, gone), and the places of
    frequent pairs.
    """

    def __init__(
        self,
        symbols: np.ndarray,
        lengths: np.ndarray,
        counts: np.ndarray,
        names: list[str],
        vocab_size: int,
        joined: Callable[[str, str], str],
    ) -> None:
        self._names, self._vocab_size, self._joined = names, vocab_size, joined
        self._ids = {name: index for index, name in enumerate(names)}
        self._base = (
            max(vocab_size, len(names)) + 1
        )  # a pair's key is first · base + second: keys are in the order of pairs
        self._symbol = symbols.astype(np.int32)
        self._weight = np.repeat(counts.astype(np.int32), lengths)
        self._link(np.cumsum(lengths) - 1)
        self._floor = 0
        self._total: dict[int, int] = {}
        self._places: dict[int, np.ndarray] = {}
        self._queue: list[tuple[int, int]] = []

    def run(self) -> list[tuple[str, str]]:
        merges: list[tuple[str, str]] = []
        while len(self._names) < self._vocab_size:
            pair = self._most_frequent()
            if pair is None:
                if self._floor == 1:
                    break
                self._count_afresh()
                continue
            first, second = divmod(pair, self._base)
            left, right = self._names[first], self._names[second]
            name = self._joined(left, right)
            is_new = name not in self._ids
            if is_new:
                self._ids[name] = len(self._names)
                self._names.append(name)
            merges.append((left, right))
            self._merge(pair, self._ids[name], is_new)
        return merges

    def _most_frequent(self) -> int | None:
        """The pair to merge next, or None where every pair is rarer than the floor. Entries of the queue may
        say more than is left.
        """
        while self._queue:
            said, pair = self._queue[0]
            total = self._total.get(pair, 0)
            if total == -said:
                return pair
            heapq.heappop(self._queue)
            if total >= self._floor:
                heapq.heappush(self._queue, (-total, pair))
            else:
                self._forget(pair)
        return None

    def _forget(self, pair: int) -> None:
        self._total.pop(pair, None)
        self._places.pop(pair, None)

    def _merge(self, pair: int, merged: int, is_new: bool) -> None:
        left = self._current_places(pair)
        self._forget(pair)
        right = self._following[left]
        before, after = self._preceding[left], self._following[right]
        self._lose(_union(before, right[after >= 0]))
        self._symbol[left], self._symbol[right] = merged, -1
        self._following[left] = after
        inner = after >= 0
        self._preceding[after[inner]] = left[inner]
        changed = (
            left if is_new else np.flatnonzero(self._symbol == merged)
        )  # another pair had made the same token before
        self._track(_union(self._preceding[changed], changed[self._following[changed] >= 0]))

    def _current_places(self, pair: int) -> np.ndarray:
        """Where the pair's first symbol stands, without what other merges have taken, and without overlaps."""
        first, second = divmod(pair, self._base)
        places: np.ndarray = self._places[pair]
        places = places[self._symbol[places] == first]
        following = self._following[places]
        places = places[(following >= 0) & (self._symbol[following] == second)]
        return places if first != second else self._without_overlaps(np.sort(places))

    def _without_overlaps(self, places: np.ndarray) -> np.ndarray:
        """Of a run of one symbol the first two, the next two, and so on; `places` are sorted."""
        index = np.arange(len(places))
        goes_on = np.concatenate([[False], self._preceding[places[1:]] == places[:-1]])[: len(places)]
        begin = np.maximum.accumulate(np.where(goes_on, 0, index))
        kept: np.ndarray = places[(index - begin) % 2 == 0]
        return kept

    def _lose(self, places: np.ndarray) -> None:
        """The pairs at these places are about to be broken."""
        keys, totals, _, _ = self._grouped(places)
        for key, lost in zip(keys.tolist(), totals.tolist(), strict=True):
            total = self._total.get(key)
            if total is not None:
                self._total[key] = total - lost

    def _track(self, places: np.ndarray) -> None:
        """Remember the frequent ones of the pairs at these places, which are all the places of these pairs."""
        keys, totals, starts, ordered = self._grouped(places)
        ends = np.append(starts[1:], len(ordered))
        for index in np.flatnonzero(totals >= self._floor).tolist():
            key, total = int(keys[index]), int(totals[index])
            self._total[key] = total
            self._places[key] = ordered[starts[index] : ends[index]].astype(np.int32)
            heapq.heappush(self._queue, (-total, key))

    def _grouped(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(pairs at these places, how often each occurs, where its places begin in the last array, the places
        by pair).
        """
        keys = self._keys(places)
        order = np.argsort(keys)
        keys, ordered = keys[order], places[order]
        starts = (
            np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
            if len(keys)
            else np.empty(0, dtype=np.int64)
        )
        weights = self._weight[ordered].astype(np.int64)
        totals = np.add.reduceat(weights, starts) if len(keys) else weights
        return keys[starts], totals, starts, ordered

    def _keys(self, places: np.ndarray) -> np.ndarray:
        keys: np.ndarray = (
            self._symbol[places].astype(np.int64) * self._base + self._symbol[self._following[places]]
        )
        return keys

    def _count_afresh(self) -> None:
        """Close the gaps, lower the floor, and count all pairs; only those that may reach the floor are
        sorted.
        """
        self._close_gaps()
        buckets = np.zeros(_BUCKETS, dtype=np.float64)  # sums of integers below 2**53
        for places in self._blocks():
            buckets += np.bincount(
                self._keys(places) % _BUCKETS, weights=self._weight[places], minlength=_BUCKETS
            )
        self._floor = max(1, (self._floor or int(buckets.max())) // _LOWER_BY)
        self._total, self._places, self._queue = {}, {}, []
        chosen = [places[buckets[self._keys(places) % _BUCKETS] >= self._floor] for places in self._blocks()]
        del buckets
        self._track(np.concatenate(chosen) if chosen else np.empty(0, dtype=np.int32))

    def _blocks(self) -> Sequence[np.ndarray]:
        """Places of all pairs, in parts."""
        pairs = np.flatnonzero(self._following >= 0).astype(np.int32)
        return [pairs[start : start + _BLOCK] for start in range(0, len(pairs), _BLOCK)]

    def _close_gaps(self) -> None:
        is_alone = (self._following < 0) & (self._preceding < 0)
        alive = (self._symbol >= 0) & ~is_alone
        ends = np.flatnonzero(self._following[alive] < 0)
        self._symbol, self._weight = self._symbol[alive], self._weight[alive]
        self._link(ends)

    def _link(self, ends: np.ndarray) -> None:
        """Make each symbol the neighbour of the next; `ends` are the places of words' last symbols."""
        self._following = np.arange(1, len(self._symbol) + 1, dtype=np.int32)
        self._following[ends] = -1
        self._preceding = np.arange(-1, len(self._symbol) - 1, dtype=np.int32)
        self._preceding[ends[:-1] + 1] = -1


def _union(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """All places of both, each once; -1 is no place."""
    places: np.ndarray = np.unique(np.concatenate([one, other]))
    return places[1:] if len(places) and places[0] < 0 else places
