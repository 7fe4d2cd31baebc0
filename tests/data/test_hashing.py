"""The mixing function is the published one, and the same on integers and on arrays."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llm_trainer.data.hashing import GOLDEN_GAMMA, splitmix64, splitmix64_array


def test_the_first_outputs_of_splitmix64_are_those_of_the_reference() -> None:
    outputs = [splitmix64(step * GOLDEN_GAMMA) for step in range(1, 4)]  # of the generator seeded with 0
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@given(st.lists(st.integers(0, 2**64 - 1), max_size=20))
def test_arrays_are_mixed_like_integers(values: list[int]) -> None:
    mixed = splitmix64_array(np.array(values, dtype=np.uint64))
    assert mixed.tolist() == [splitmix64(value) for value in values]
