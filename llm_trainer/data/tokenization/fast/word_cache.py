"""Ids of words that were seen before, looked up for all words of a buffer at once.

A word of up to fifteen bytes and its length are two numbers of 64 bits, so that comparing it is exact and
needs no strings. Its entry lies at one of two places that follow from them; what finds both taken, and longer
words, go through a dictionary. numpy does the rest: no Python runs for a word that is in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

CACHE_WORDS = 2**17  # beyond this all are forgotten, and the frequent ones are soon back
_SLOT_BITS = 18
_LONGEST = 15  # bytes of a word in the table
_LONGEST_KEPT = 64  # bytes of a word in the dictionary
_MOST_IDS = 255
_PADDING = b"\0" * 24  # so that sixteen bytes can be read wherever a word begins
_MIXERS = (
    np.uint64(0x9E3779B97F4A7C15),
    np.uint64(0xC2B2AE3D27D4EB4F),
)  # odd numbers without pattern: the golden ratio's, and xxHash's
_HALF, _DROPPED = np.uint64(32), np.uint64(64 - _SLOT_BITS)


def _masks(skipped: int) -> np.ndarray:
    """By length of a word, which bits of the eight bytes behind its first `skipped` are its own."""
    own = [min(max(length - skipped, 0), 8) for length in range(_LONGEST + 2)]
    return np.array([(1 << 8 * count) - 1 for count in own], dtype=np.uint64)


_MASKS = (_masks(0), _masks(8))
_LENGTHS = np.arange(_LONGEST + 2, dtype=np.uint64) << np.uint64(
    56
)  # where the sixteenth byte would be; that of longer words is no word's


class WordTable:
    """Word (bytes) → ids; `ids_of_word` is asked once for each word, and again after it was forgotten."""

    def __init__(self, ids_of_word: Callable[[bytes], list[int]]) -> None:
        self._ids_of_word = ids_of_word
        self._forget()

    def __len__(self) -> int:
        """Words that are remembered."""
        return len(self._known)

    def _forget(self) -> None:
        shape = (2, 1 << _SLOT_BITS)
        self._low, self._high = (
            np.zeros(shape, np.uint64),
            np.zeros(shape, np.uint64),
        )  # no word is 0: it has a length
        self._place = np.zeros(shape, np.int64)  # in the pool: offset × 256 + count
        self._known: dict[bytes, tuple[int, int]] = {}
        self._pool, self._used = np.zeros(1 << 16, np.uint32), 0

    def ids(self, raw: bytes, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the words of `raw` one after the other, uint32 `(ids,)`, and where each word's end, int64
        `(words,)`.

        `starts` are the places of the words' first bytes in order, the first of them 0; a word reaches to the next.
        """
        if len(self._known) >= CACHE_WORDS:
            self._forget()
        lengths = np.diff(starts, append=len(raw))
        padded = raw + _PADDING
        eights = np.ndarray(
            (len(raw) + len(_PADDING) - 7,), "<u8", padded, strides=(1,)
        )  # eight bytes from every place on
        short = np.minimum(lengths, _LONGEST + 1)
        low, high = (
            eights.take(starts) & _MASKS[0].take(short),
            eights.take(starts + 8) & _MASKS[1].take(short),
        )
        high |= _LENGTHS.take(short)
        offsets, counts, missing = self._look_up(low, high)
        for word, first_slot, second_slot in missing:
            start = int(starts[word])
            key = raw[start : start + int(lengths[word])]
            found = self._known.get(key) or self._learn(
                key, (first_slot, second_slot), int(low[word]), int(high[word])
            )
            offsets[word], counts[word] = found
        ends = np.cumsum(counts)
        places = np.repeat(offsets - (ends - counts), counts)
        places += np.arange(len(places))
        return self._pool[places], ends

    def _look_up(
        self, low: np.ndarray, high: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, Iterator[tuple[int, int, int]]]:
        """Offset and count of each word in the pool of ids, and (word, its two slots) of those that the table
        does not hold.
        """
        first = _slots(0, low, high)
        hits = (self._low[0].take(first) == low) & (self._high[0].take(first) == high)
        place = self._place[0].take(first)
        rest = np.flatnonzero(~hits)
        second = _slots(1, low[rest], high[rest])
        hits = (self._low[1].take(second) == low[rest]) & (self._high[1].take(second) == high[rest])
        place[rest[hits]] = self._place[1].take(second[hits])
        left = rest[~hits]
        return (
            place >> 8,
            place & 0xFF,
            zip(left.tolist(), first[left].tolist(), second[~hits].tolist(), strict=True),
        )

    def _learn(self, word: bytes, slots: tuple[int, int], low: int, high: int) -> tuple[int, int]:
        ids = self._ids_of_word(word)
        offset = self._used
        self._used += len(ids)
        if self._used > len(self._pool):
            self._pool = np.concatenate([self._pool, np.zeros(max(len(self._pool), len(ids)), np.uint32)])
        self._pool[offset : self._used] = ids
        if len(word) <= _LONGEST_KEPT and len(self._known) < CACHE_WORDS:
            self._known[word] = (offset, len(ids))
            for side, slot in enumerate(slots):
                if len(word) <= _LONGEST and len(ids) <= _MOST_IDS and self._high[side, slot] == 0:
                    self._low[side, slot], self._high[side, slot], self._place[side, slot] = (
                        low,
                        high,
                        offset << 8 | len(ids),
                    )
                    break
        return offset, len(ids)


def _slots(side: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Where words stand in one side of the table: the upper bits of a product, mixed twice."""
    mixed = (low ^ (high * _MIXERS[1])) * _MIXERS[side]
    mixed ^= mixed >> _HALF
    mixed *= _MIXERS[1 - side]
    return (mixed >> _DROPPED).astype(np.int64)
