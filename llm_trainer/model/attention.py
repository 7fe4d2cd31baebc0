"""Softmax attention by the fastest way that the device has for it.

PyTorch's fused kernels nearly always. The exception is training in bf16 on a CPU over short sequences: the
fused backward pass multiplies tiles too small for the matrix units (AMX, AVX512-BF16) and takes ten times as
long as whole products there (4 heads of 32, 64 tokens, batch 12: 7.0 ms against 0.6; at 512 tokens 22 against
9; at 1024 they are even, and the scores cost memory).
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT = 512  # tokens


class Share(Protocol):
    """A part of each sequence, where the other tokens are elsewhere: what a model has to be told to work on
    its part alone.

    All else in a model is done token by token.
    """

    def places(self, count: int, device: torch.device) -> tuple[int, Tensor]:
        """How long sequences are of which `count` tokens are here, and where in them these stand, (count,)
        int64.
        """

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, dropout: float = 0.0
    ) -> Tensor:
        """As the function `attend`, with a mask (or causally, without one) over all tokens of the sequences,
        in their order.
        """


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, dropout: float = 0.0
) -> Tensor:
    """queries (B, H, T, D), keys and values (B, KV, S, D) → (B, H, T, D).

    mask: additive, broadcastable to (B, H, T, S); without one attention is causal, and a single query sees
    all keys. KV heads are shared by neighbouring query heads.
    """
    if _is_short_cpu_training(queries, keys) and dropout == 0.0:
        return attend_by_products(queries, keys, values, mask)
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


def attend_by_products(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """The same with all scores at once: two batched products around a softmax, which rounds scores to the
    queries' type.
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
        and queries.size(2) == keys.size(2) <= SHORT
    )
