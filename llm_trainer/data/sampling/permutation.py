"""A keyed permutation of 0 … n-1: a shuffled order that nobody stores.

Shuffling a list of samples needs the list, and knowing where one is after a resume needs the whole shuffle
again. A permutation computed from a key gives sample i of epoch e at once, in O(1) time and memory, on any
rank and in any order of asking.

A Feistel network over a rectangle of a × b ≥ n cells (the generalised form of Black & Rogaway 2002, "Ciphers
with arbitrary finite domains") is a bijection whatever its round function; cells outside 0 … n-1 are walked
on until they fall inside. a and b are near √n, so that a walk is rare. It need not withstand an enemy, only
look shuffled: eight rounds of a 64-bit mixer do.
"""

from __future__ import annotations

import math

import numpy as np

from llm_trainer.data.hashing import GOLDEN_GAMMA, splitmix64, splitmix64_array

_ROUNDS = 8


class KeyedPermutation:
    """A bijection of 0 … size-1, another for each key. Vectorised: arrays in, arrays out."""

    def __init__(self, size: int, key: int) -> None:
        assert size > 0
        self.size = size
        self._left_size = max(1, math.isqrt(size - 1) + 1)
        self._right_size = -(-size // self._left_size)
        self._round_keys = [splitmix64(key + (round_ + 1) * GOLDEN_GAMMA) for round_ in range(_ROUNDS)]

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Where each of `indices` (any shape, integers in 0 … size-1) goes; int64 of the same shape."""
        values = self._once(np.asarray(indices, dtype=np.uint64))
        while (outside := values >= self.size).any():
            values[outside] = self._once(values[outside])
        return values.astype(np.int64)

    def _once(self, values: np.ndarray) -> np.ndarray:
        right_size, left_size = np.uint64(self._right_size), np.uint64(self._left_size)
        left, right = values // right_size, values % right_size
        for number, key in enumerate(self._round_keys):
            if number % 2:
                right = (right + _round(left, key)) % right_size
            else:
                left = (left + _round(right, key)) % left_size
        return left * right_size + right


def _round(values: np.ndarray, key: int) -> np.ndarray:
    """The keyed round function on uint64 arrays, halved so that a sum with a smaller number cannot wrap."""
    halved: np.ndarray = splitmix64_array(values + np.uint64(key)) >> np.uint64(1)
    return halved


def combine(*parts: int) -> int:
    """One 64-bit key from several numbers, in order."""
    key = 0
    for part in parts:
        key = splitmix64(key * 0x2545F4914F6CDD1D + splitmix64(part + 0x632BE59BD9B4E019))
    return key
