"""Learns the merges of byte pair encoding from counted words, with numpy.

* What: training repeatedly merges the most frequent pair of neighbouring symbols (among equally frequent
  pairs, the one with the smaller ids). The `tokenizers` library keeps for each pair the set of all words that
  contain it, about a kilobyte per word, although most pairs are far too rare ever to be merged. Here the
  symbols of all words are in a few flat arrays, 16 bytes per symbol, and positions are kept only for pairs
  that occur at least `_floor` times. When no such pair is left, the floor is lowered and all pairs are
  counted again. A pair that is not tracked is rarer than the floor, so the most frequent tracked pair is the
  most frequent of all.
* Why: 32,000 ids from 100 MB of text take 7.9 s and 101 MB of memory, against 10.0 s and 145 MB with the
  library (`benchmarks/bpe_training.py`).
* Must equal: the merges of the library in the same order; `tests/data/tokenization/test_vocab_training.py`
  compares them on random text with few letters, where ties and overlaps are frequent.
* Switch off: LLM_TRAINER_FAST_TOKENIZER=0.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import numpy as np

_FLOOR_DIVISOR = 8
_BLOCK = 2**20
_BUCKETS = 2**20


def learn_bpe_merges(
    symbols: np.ndarray,
    lengths: np.ndarray,
    counts: np.ndarray,
    names: list[str],
    vocab_size: int,
    merge_names: Callable[[str, str], str],
) -> list[tuple[str, str]]:
    """Merge pairs until there are `vocab_size` names or no pair is left.

    Args:
        symbols: The ids of all words, one word after the other, int32 `(symbols,)`.
        lengths: Number of ids of each word, int64 `(words,)`.
        counts: How often each word occurs, int64 `(words,)`.
        names: The token of each id; the new tokens are appended to it.
        vocab_size: Number of names to reach.
        merge_names: Makes the name of a merged pair.

    Returns:
        The merges in order.
    """
    return _BPETrainer(symbols, lengths, counts, names, vocab_size, merge_names).run()


class _BPETrainer:
    """The symbols as a linked list in flat arrays, and the positions of frequent pairs.

    -1 means no neighbour or, in the array of symbols, that the symbol has been merged into the one before it.
    """

    def __init__(
        self,
        symbols: np.ndarray,
        lengths: np.ndarray,
        counts: np.ndarray,
        names: list[str],
        vocab_size: int,
        merge_names: Callable[[str, str], str],
    ) -> None:
        self._names, self._vocab_size, self._merge_names = names, vocab_size, merge_names
        self._ids = {name: index for index, name in enumerate(names)}
        # The key of a pair is first · base + second, so keys have the order of pairs.
        self._base = max(vocab_size, len(names)) + 1
        self._symbol = symbols.astype(np.int32)
        self._weight = np.repeat(counts.astype(np.int32), lengths)
        self._link(np.cumsum(lengths) - 1)
        self._floor = 0
        self._total: dict[int, int] = {}
        self._positions: dict[int, np.ndarray] = {}
        self._queue: list[tuple[int, int]] = []

    def run(self) -> list[tuple[str, str]]:
        merges: list[tuple[str, str]] = []
        while len(self._names) < self._vocab_size:
            pair = self._most_frequent()
            if pair is None:
                if self._floor == 1:
                    break
                self._count_again()
                continue
            first, second = divmod(pair, self._base)
            left, right = self._names[first], self._names[second]
            name = self._merge_names(left, right)
            is_new = name not in self._ids
            if is_new:
                self._ids[name] = len(self._names)
                self._names.append(name)
            merges.append((left, right))
            self._merge(pair, self._ids[name], is_new)
        return merges

    def _most_frequent(self) -> int | None:
        """The pair to merge next, or None if every pair is rarer than the floor.

        The counts in the queue may be outdated: they are then larger than the true ones.
        """
        while self._queue:
            queued, pair = self._queue[0]
            total = self._total.get(pair, 0)
            if total == -queued:
                return pair
            heapq.heappop(self._queue)
            if total >= self._floor:
                heapq.heappush(self._queue, (-total, pair))
            else:
                self._forget(pair)
        return None

    def _forget(self, pair: int) -> None:
        self._total.pop(pair, None)
        self._positions.pop(pair, None)

    def _merge(self, pair: int, merged: int, is_new: bool) -> None:
        left = self._current_positions(pair)
        self._forget(pair)
        right = self._following[left]
        before, after = self._preceding[left], self._following[right]
        self._subtract(_union(before, right[after >= 0]))
        self._symbol[left], self._symbol[right] = merged, -1
        self._following[left] = after
        inner = after >= 0
        self._preceding[after[inner]] = left[inner]
        # If the token is not new, another pair has made it before.
        changed = left if is_new else np.flatnonzero(self._symbol == merged)
        self._track(_union(self._preceding[changed], changed[self._following[changed] >= 0]))

    def _current_positions(self, pair: int) -> np.ndarray:
        """Positions of the pair's first symbol that other merges have not taken, without overlaps."""
        first, second = divmod(pair, self._base)
        positions: np.ndarray = self._positions[pair]
        positions = positions[self._symbol[positions] == first]
        following = self._following[positions]
        positions = positions[(following >= 0) & (self._symbol[following] == second)]
        return positions if first != second else self._without_overlaps(np.sort(positions))

    def _without_overlaps(self, positions: np.ndarray) -> np.ndarray:
        """In a run of one symbol, the first two, the next two, and so on; `positions` are sorted."""
        index = np.arange(len(positions))
        continues = np.concatenate([[False], self._preceding[positions[1:]] == positions[:-1]])
        begin = np.maximum.accumulate(np.where(continues[: len(positions)], 0, index))
        kept: np.ndarray = positions[(index - begin) % 2 == 0]
        return kept

    def _subtract(self, positions: np.ndarray) -> None:
        """Subtract the pairs at these positions, which are about to disappear."""
        keys, totals, _, _ = self._grouped(positions)
        for key, lost in zip(keys.tolist(), totals.tolist(), strict=True):
            total = self._total.get(key)
            if total is not None:
                self._total[key] = total - lost

    def _track(self, positions: np.ndarray) -> None:
        """Track the frequent pairs at these positions, which include all positions of these pairs."""
        keys, totals, starts, ordered = self._grouped(positions)
        ends = np.append(starts[1:], len(ordered))
        for index in np.flatnonzero(totals >= self._floor).tolist():
            key, total = int(keys[index]), int(totals[index])
            self._total[key] = total
            self._positions[key] = ordered[starts[index] : ends[index]].astype(np.int32)
            heapq.heappush(self._queue, (-total, key))

    def _grouped(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Group positions by their pairs.

        Returns the pairs, how often each occurs, where its positions begin in the last array, and the
        positions ordered by pair.
        """
        keys = self._keys(positions)
        order = np.argsort(keys)
        keys, ordered = keys[order], positions[order]
        starts = (
            np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
            if len(keys)
            else np.empty(0, dtype=np.int64)
        )
        weights = self._weight[ordered].astype(np.int64)
        totals = np.add.reduceat(weights, starts) if len(keys) else weights
        return keys[starts], totals, starts, ordered

    def _keys(self, positions: np.ndarray) -> np.ndarray:
        first, second = self._symbol[positions], self._symbol[self._following[positions]]
        keys: np.ndarray = first.astype(np.int64) * self._base + second
        return keys

    def _count_again(self) -> None:
        """Close the gaps, lower the floor, and count all pairs; only those that may reach it are sorted."""
        self._close_gaps()
        buckets = np.zeros(_BUCKETS, dtype=np.float64)  # sums of integers below 2**53
        for positions in self._blocks():
            buckets += np.bincount(
                self._keys(positions) % _BUCKETS, weights=self._weight[positions], minlength=_BUCKETS
            )
        self._floor = max(1, (self._floor or int(buckets.max())) // _FLOOR_DIVISOR)
        self._total, self._positions, self._queue = {}, {}, []
        chosen = [
            positions[buckets[self._keys(positions) % _BUCKETS] >= self._floor]
            for positions in self._blocks()
        ]
        del buckets
        self._track(np.concatenate(chosen) if chosen else np.empty(0, dtype=np.int32))

    def _blocks(self) -> Sequence[np.ndarray]:
        """Positions of all pairs, in blocks."""
        pairs = np.flatnonzero(self._following >= 0).astype(np.int32)
        return [pairs[start : start + _BLOCK] for start in range(0, len(pairs), _BLOCK)]

    def _close_gaps(self) -> None:
        is_alone = (self._following < 0) & (self._preceding < 0)
        alive = (self._symbol >= 0) & ~is_alone
        ends = np.flatnonzero(self._following[alive] < 0)
        self._symbol, self._weight = self._symbol[alive], self._weight[alive]
        self._link(ends)

    def _link(self, ends: np.ndarray) -> None:
        """Make each symbol the neighbour of the next; `ends` are the positions of the words' last symbols."""
        self._following = np.arange(1, len(self._symbol) + 1, dtype=np.int32)
        self._following[ends] = -1
        self._preceding = np.arange(-1, len(self._symbol) - 1, dtype=np.int32)
        self._preceding[ends[:-1] + 1] = -1


def _union(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """All positions of both, sorted, each once and without -1.

    `np.unique` hashes, and takes quadratic time for positions at equal distances, as in a run of one letter.
    """
    positions = np.sort(np.concatenate([one, other]))
    first_of_equals = np.concatenate([[True], positions[1:] != positions[:-1]])[: len(positions)]
    union: np.ndarray = positions[first_of_equals & (positions >= 0)]
    return union
