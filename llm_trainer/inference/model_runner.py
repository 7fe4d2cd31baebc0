"""One decoding step: the last token of each sequence in, the hidden state that its next token is sampled from
out.

`EagerModelRunner` runs the model as it is. `cpu.fused_decoder.FusedDecoder` computes the same in about half
as many operations, and can be compiled; tests/inference/cpu/test_fused_decoder.py checks that the two agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from llm_trainer.model.kv_cache import KVCache
from llm_trainer.model.transformer import Transformer


class ModelRunner(Protocol):
    """Runs the model for one decoding step."""

    def __call__(self, ids: Sequence[int], positions: Sequence[int], cache: KVCache) -> Tensor:
        """Run one step.

        Args:
            ids: The last token of each row, B of them.
            positions: The position of each of these tokens.
            cache: Keys and values of earlier tokens; those of these tokens are added.

        Returns:
            Hidden states after the last norm, (B, C).
        """
        ...


class EagerModelRunner:
    """Runs the model as it is."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def __call__(self, ids: Sequence[int], positions: Sequence[int], cache: KVCache) -> Tensor:
        """See `ModelRunner`. Rows at one position take the cache's fast path, which needs no mask."""
        device = self.model.wte.weight.device
        inputs = torch.tensor(ids, device=device)[:, None]
        if len(set(positions)) == 1:
            cache.length = positions[0]
            hidden = self.model.hidden_states(inputs, cache=cache)
        else:
            each = torch.tensor(positions, device=device)[:, None]
            hidden = self.model.hidden_states(inputs, positions=each, cache=cache)
        return hidden[:, 0]
