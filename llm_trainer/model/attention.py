"""Softmax attention by the fastest way that the device has for it.

That is nearly always PyTorch's fused kernel. The exception is training in bf16 on a CPU over short sequences.
There the backward pass of the fused kernel multiplies tiles too small for the matrix units (AMX, AVX512-BF16)
and takes ten times as long as products of whole matrices (4 heads of 32, 64 tokens, batch 12: 7.0 ms against
0.6; at 512 tokens 22 against 9). At 1024 tokens the two take equally long, and the scores cost memory.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

EAGER_MAX_TOKENS = 512


class SequenceShard(Protocol):
    """The part of each sequence that one rank has, where other ranks have the other tokens.

    A model under context parallelism needs it for positions, masks and attention; everything else in a model
    is computed token by token. `distributed/context_parallel.py` implements it.
    """

    def token_positions(self, count: int, device: torch.device) -> tuple[int, Tensor]:
        """Where the local tokens are in their sequences.

        Args:
            count: How many tokens of each sequence are on this rank.
            device: The device of the result.

        Returns:
            The length of the complete sequences, and the positions of the local tokens, (count,) int64.
        """

    def attention(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, dropout: float = 0.0
    ) -> Tensor:
        """Like the function `attention`, from the local tokens to the complete sequences.

        The mask has a column for every token of the sequences, in their order; without one, attention is
        causal.
        """


def attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, dropout: float = 0.0
) -> Tensor:
    """Scaled dot-product attention; each key-value head serves a group of neighbouring query heads.

    Args:
        queries: (B, H, T, D).
        keys: (B, KV, S, D).
        values: (B, KV, S, D).
        mask: Additive, broadcastable to (B, H, T, S). None: causal, and a single query sees all keys.
        dropout: Probability with which an attention weight is zeroed.

    Returns:
        (B, H, T, D).
    """
    if _is_short_cpu_training(queries, keys) and dropout == 0.0:
        return eager_attention(queries, keys, values, mask)
    causal = mask is None
    if queries.size(2) == 1:  # a statement, for a compiler that knows the length as a symbol only
        causal = False
    return F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        enable_gqa=keys.size(1) != queries.size(1),
    )


def eager_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention with all scores at once: two batched products around a softmax.

    Scores are rounded to the type of the queries. Arguments and result are those of `attention`, with as many
    keys as queries.
    """
    batch, heads, count, width = queries.shape
    if keys.size(1) != heads:
        keys, values = (x.repeat_interleave(heads // x.size(1), dim=1) for x in (keys, values))
    if mask is None:
        mask = torch.full((count, count), -math.inf, dtype=queries.dtype, device=queries.device).triu_(1)
    else:
        mask = mask.expand(batch, heads, count, count).reshape(batch * heads, count, count)
    q, k, v = (x.reshape(batch * heads, count, width) for x in (queries, keys, values))
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=1.0 / math.sqrt(width))
    return torch.bmm(torch.softmax(scores, -1), v).view(batch, heads, count, width)


def _is_short_cpu_training(queries: Tensor, keys: Tensor) -> bool:
    return (
        queries.device.type == "cpu"
        and queries.dtype == torch.bfloat16
        and queries.requires_grad
        and torch.is_grad_enabled()
        and queries.size(2) == keys.size(2) <= EAGER_MAX_TOKENS
    )
