"""Hashes and mixers that give every process the same pseudo-random numbers without any stored state.

Data order and splits are pure functions of keys: a document's split follows from its content hash, a sample's
position from the seed and the epoch. Both need a function that turns a number into one that looks unrelated
to it. This module holds the one that the project uses, the finalizer of splitmix64 (Steele et al. 2014, "Fast
splittable pseudorandom number generators"), on Python integers and on numpy arrays.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # splitmix64's increment: 2**64 divided by the golden ratio, made odd
_MASK = 2**64 - 1
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def splitmix64(value: int) -> int:
    """Mix the low 64 bits of an integer with splitmix64's finalizer, a bijection on 64-bit numbers."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * _FACTORS[0]) & _MASK
    value = ((value ^ (value >> 27)) * _FACTORS[1]) & _MASK
    return value ^ (value >> 31)


def splitmix64_array(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply `splitmix64` to each element of a uint64 array."""
    mixed = (values ^ (values >> np.uint64(30))) * np.uint64(_FACTORS[0])
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(_FACTORS[1])
    result: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return result


def derive_key(*parts: int) -> int:
    """Derive one 64-bit key from several integers; their order matters.

    Args:
        parts: For example a seed, an epoch and the number of a random stream.
    """
    key = 0
    for part in parts:
        key = splitmix64(key * 0x2545F4914F6CDD1D + splitmix64(part + 0x632BE59BD9B4E019))
    return key


def hash_fractions(hashes: NDArray[np.uint64], salt: str) -> NDArray[np.float64]:
    """Map each content hash to a number in [0, 1) that depends on the hash and the salt alone.

    Args:
        hashes: 128-bit hashes as uint64 `(n, 2)`.
        salt: Makes independent draws from the same hashes.

    Returns:
        float64 `(n,)`.
    """
    start = np.uint64(int.from_bytes(hashlib.blake2b(salt.encode("utf-8"), digest_size=8).digest(), "little"))
    mixed = splitmix64_array((hashes[:, 0] ^ start) + hashes[:, 1] * np.uint64(GOLDEN_GAMMA))
    fractions: NDArray[np.float64] = (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53
    return fractions


def hash_fraction(text: str, salt: str) -> float:
    """Map a text to a number in [0, 1) that depends on the text and the salt alone."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=salt.encode("utf-8")).digest()
    return int.from_bytes(digest, "big") / 2**64
