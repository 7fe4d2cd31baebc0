"""The 64-bit mixing function that shuffles, splits and seeds are derived with.

It is the finalizer of splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"): a
bijection of 64-bit integers in which neighbouring inputs have unrelated outputs. It depends on neither the process nor
the machine, so everything that is derived with it is reproducible.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio, made odd: splitmix64 adds it from one state to the next."""
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = 2**64 - 1


def splitmix64(value: int) -> int:
    """Mix one integer, taken modulo 2^64; the result is in [0, 2^64)."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * _FACTORS[0]) & _MASK
    value = ((value ^ (value >> 27)) * _FACTORS[1]) & _MASK
    return value ^ (value >> 31)


def splitmix64_array(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix each integer of a uint64 array; the result equals `splitmix64` of each and has the same shape."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FACTORS[0])
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_FACTORS[1])
    return values ^ (values >> np.uint64(31))
