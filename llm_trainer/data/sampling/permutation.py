"""A keyed permutation of 0 … n-1: a shuffled order that is computed instead of stored.

Shuffling a list of samples needs the list, and finding the position in it after a resume needs the whole
shuffle again. A permutation that is computed from a key gives sample i of epoch e directly, in O(1) time and
memory, on any rank and in any order of access.

The permutation is a Feistel network over a rectangle of a × b ≥ n cells (the generalised form of Black &
Rogaway 2002, "Ciphers with arbitrary finite domains"), which is a bijection whatever its round function is.
Cells outside 0 … n-1 are permuted again until they fall inside (cycle walking). a and b are close to √n, so
that this is rare. The order does not have to resist an attacker, it only has to look shuffled: eight rounds
of a 64-bit mixer are enough.
"""

from __future__ import annotations

import math

import numpy as np

from llm_trainer.data.hashing import GOLDEN_GAMMA, splitmix64, splitmix64_array

_ROUNDS = 8


class KeyedPermutation:
    """A bijection of 0 … size-1 that differs for each key. It is vectorised: arrays in, arrays out."""

    def __init__(self, size: int, key: int) -> None:
        assert size > 0
        self.size = size
        self._left_size = max(1, math.isqrt(size - 1) + 1)
        self._right_size = -(-size // self._left_size)
        self._round_keys = [splitmix64(key + (round_ + 1) * GOLDEN_GAMMA) for round_ in range(_ROUNDS)]

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Permute indices.

        Args:
            indices: Integers in 0 … size-1, of any shape.

        Returns:
            The permuted indices, int64 of the same shape.
        """
        values = self._permute_cells(np.asarray(indices, dtype=np.uint64))
        while (outside := values >= self.size).any():
            values[outside] = self._permute_cells(values[outside])
        return values.astype(np.int64)

    def _permute_cells(self, values: np.ndarray) -> np.ndarray:
        right_size, left_size = np.uint64(self._right_size), np.uint64(self._left_size)
        left, right = values // right_size, values % right_size
        for number, key in enumerate(self._round_keys):
            if number % 2:
                right = (right + _round_function(left, key)) % right_size
            else:
                left = (left + _round_function(right, key)) % left_size
        return left * right_size + right


def _round_function(values: np.ndarray, key: int) -> np.ndarray:
    """63-bit pseudo-random numbers, so that the sum with a smaller number does not overflow."""
    return splitmix64_array(values + np.uint64(key)) >> np.uint64(1)
