"""The state of this rank's random number generators, for user code that draws from them.

The library does not need it: batches, dropout and generation are functions of a seed and a position
(`data/sampling/samplers.py`, `engines/train_step.py`), so a run is the same on any number of ranks. A user's
own callback or objective may draw from torch, numpy or Python's `random`, and resumes exactly only if each
rank's generators are restored. They are restored on the number of ranks that saved them. On another number
they stay as they are, because no assignment would be right.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from llm_trainer.run_dir import JSON


def get_rng_state() -> dict[str, JSON]:
    """The generators of Python, numpy, torch on the CPU and, where CUDA is initialized, this rank's GPU.

    Returns:
        Values for JSON. Arrays are base64 text.
    """
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, JSON] = {
        "python": [version, _text(np.array(words, dtype=np.uint32)), gauss],
        "numpy": [_text(np.asarray(keys, dtype=np.uint32)), int(position), int(has_gauss), float(cached)],
        "torch": _text(torch.get_rng_state().numpy()),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = _text(torch.cuda.get_rng_state().numpy())
    return state


def set_rng_state(state: Mapping[str, JSON]) -> None:
    """Restore what `get_rng_state` returned.

    Args:
        state: The stored values. The GPU's are ignored on a machine without one.
    """
    version, words, gauss = _as_list(state["python"])
    random.setstate((version, tuple(int(word) for word in _array(words, np.uint32)), gauss))
    keys, position, has_gauss, cached = _as_list(state["numpy"])
    np.random.set_state(("MT19937", _array(keys, np.uint32), position, has_gauss, cached))  # type: ignore[arg-type]
    torch.set_rng_state(torch.from_numpy(_array(state["torch"], np.uint8)))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.from_numpy(_array(state["cuda"], np.uint8)))


def _text(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode("ascii")


def _array(text: JSON, kind: type[np.generic]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(str(text)), dtype=kind).copy()


def _as_list(value: JSON) -> Sequence[JSON]:
    assert isinstance(value, Sequence), "get_rng_state wrote a list"
    return value
