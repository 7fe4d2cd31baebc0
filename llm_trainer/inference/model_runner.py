"""One decoding step: a token for each row of the batch in, the hidden state that its successor is drawn from
out (by `head.Head`).

With one sequence a step is a matrix-vector product with every weight, so it takes as long as reading all
weights once, plus what the many small operations around them cost. `ModelStep` runs the model as it is;
`fused.FusedStep` computes the same in about half as many operations, and can be compiled.
tests/inference/test_steps.py holds them to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from llm_trainer.model.kv_cache import KVCache
from llm_trainer.model.transformer import Transformer


class DecodingStep(Protocol):
    """What `decode` calls once a token."""

    def __call__(self, ids: Sequence[int], positions: Sequence[int], cache: KVCache) -> Tensor:
        """Token and its position for each row (B) → hidden states (B, C) after the last norm; keys and values
        are added to the cache.
        """
        ...


class ModelStep:
    """The step through the model as it is."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def __call__(self, ids: Sequence[int], positions: Sequence[int], cache: KVCache) -> Tensor:
        """Rows at one position go the fast path of the cache, which needs neither mask nor indexed writes."""
        device = self.model.wte.weight.device
        inputs = torch.tensor(ids, device=device)[:, None]
        if len(set(positions)) == 1:
            cache.length = positions[0]
            hidden = self.model.hidden_states(inputs, cache=cache)
        else:
            hidden = self.model.hidden_states(
                inputs, positions=torch.tensor(positions, device=device)[:, None], cache=cache
            )
        return hidden[:, 0]
