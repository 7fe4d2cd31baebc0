"""Activation checkpointing of a block: what its backward pass needs is computed again instead of kept (Chen
et al. 2016, arXiv:1604.06174).

By default a block keeps its input alone. Selectively (torch's own policies) the results of costly operations
are kept as well: attention's kernel, which takes longest for its memory on long contexts, or matrix products,
after which only cheap element-wise work is done again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_aten = torch.ops.aten
# What a name in `checkpoint_keep` covers.
KEPT: dict[str, frozenset[Any]] = {
    "attention": frozenset(
        {
            _aten._scaled_dot_product_flash_attention_for_cpu.default,
            _aten._scaled_dot_product_flash_attention.default,
            _aten._scaled_dot_product_efficient_attention.default,
            _aten._scaled_dot_product_cudnn_attention.default,
            _aten.baddbmm.default,  # attention by products, short sequences on CPUs
            _aten.bmm.default,
        }
    ),
    "products": frozenset({_aten.mm.default, _aten.addmm.default, _aten.linear.default}),
}


def recomputed(block: nn.Module, x: Tensor, *inputs: object, keep: Sequence[str] = ()) -> Tensor:
    """The block's output (B, T, C) for `x` and what else it takes.

    Its inner activations are computed again in the backward pass, but for what `keep` names.
    """
    if not keep:
        whole: Tensor = checkpoint(block, x, *inputs, use_reentrant=False)
        return whole
    contexts = _contexts(frozenset().union(*(KEPT[name] for name in keep)))
    chosen: Tensor = checkpoint(block, x, *inputs, use_reentrant=False, context_fn=contexts)
    return chosen


@functools.cache
def _contexts(kept: frozenset[Any]) -> Callable[[], Any]:
    """torch's pair of contexts for these operations."""

    def policy(context: object, operation: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return functools.partial(create_selective_checkpoint_contexts, policy)
