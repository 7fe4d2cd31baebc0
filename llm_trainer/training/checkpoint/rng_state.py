"""The state of this process's random number generators, for those who draw from them: a callback, an
objective of one's own.

The library itself does not: batches, dropout and generation are functions of a seed and a place (see `sampling/samplers.py`,
`step.py`), and that is what makes a run the same on any number of ranks. What a person adds may draw from torch, numpy or Python's
`random`, and goes on exactly only if each rank's generators do. Given back on as many ranks as were saved; on another number there is
nothing that it could mean, and they stay as they are.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from llm_trainer.run_dir import JSON


def random_state() -> dict[str, JSON]:
    """The generators of Python, numpy, torch's CPU and, where it is in use, this rank's GPU."""
    version, words, gauss = random.getstate()
    _, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, JSON] = {
        "python": [version, _text(np.array(words, dtype=np.uint32)), gauss],
        "numpy": [_text(np.asarray(keys, dtype=np.uint32)), int(place), int(has_gauss), float(cached)],
        "torch": _text(torch.get_rng_state().numpy()),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = _text(torch.cuda.get_rng_state().numpy())
    return state


def restore_random_state(state: Mapping[str, JSON]) -> None:
    """Give the generators what `random_state` took."""
    version, words, gauss = _listed(state["python"])
    random.setstate((version, tuple(int(word) for word in _array(words, np.uint32)), gauss))
    keys, place, has_gauss, cached = _listed(state["numpy"])
    np.random.set_state(("MT19937", _array(keys, np.uint32), place, has_gauss, cached))  # type: ignore[arg-type]
    torch.set_rng_state(torch.from_numpy(_array(state["torch"], np.uint8)))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.from_numpy(_array(state["cuda"], np.uint8)))


def _text(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode("ascii")


def _array(text: JSON, kind: type[np.generic]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(str(text)), dtype=kind).copy()


def _listed(value: JSON) -> Sequence[JSON]:
    assert isinstance(value, Sequence), "random_state wrote a list"
    return value
