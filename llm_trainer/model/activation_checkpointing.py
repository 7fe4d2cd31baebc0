"""Activation checkpointing of a block: its activations are computed again in the backward pass instead of
kept (Chen et al. 2016, arXiv:1604.06174).

By default only the block's input is kept. With a policy (PyTorch's selective activation checkpointing) the
results of costly operations are kept as well: attention's kernel, which takes the longest for its memory on
long contexts, or matrix products, after which only cheap element-wise operations are repeated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from llm_trainer.torch_compat import fused_attention_ops

_aten = torch.ops.aten
# Name in `activation_checkpoint_policy` → the operations whose results are kept. The batched products are
# those of eager attention, which computes short sequences on CPUs.
SAVED_OPERATIONS: dict[str, frozenset[Any]] = {
    "attention": fused_attention_ops() | {_aten.baddbmm.default, _aten.bmm.default},
    "matmul": frozenset({_aten.mm.default, _aten.addmm.default, _aten.linear.default}),
}


def checkpointed(block: nn.Module, x: Tensor, *inputs: object, policy: Sequence[str] = ()) -> Tensor:
    """Run a block, and recompute its activations in the backward pass.

    Args:
        block: The module to run.
        x: Its first input, (B, T, C).
        *inputs: Its other inputs.
        policy: Which results are kept and not recomputed, by their names in `SAVED_OPERATIONS`.

    Returns:
        The block's output, (B, T, C).
    """
    if not policy:
        output: Tensor = checkpoint(block, x, *inputs, use_reentrant=False)
        return output
    contexts = _contexts(frozenset().union(*(SAVED_OPERATIONS[name] for name in policy)))
    selective: Tensor = checkpoint(block, x, *inputs, use_reentrant=False, context_fn=contexts)
    return selective


@functools.cache
def _contexts(saved: frozenset[Any]) -> Callable[[], Any]:
    """PyTorch's pair of contexts (forward, recomputation) that keeps the results of these operations."""

    def policy(context: object, operation: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operation in saved else CheckpointPolicy.PREFER_RECOMPUTE

    return functools.partial(create_selective_checkpoint_contexts, policy)
