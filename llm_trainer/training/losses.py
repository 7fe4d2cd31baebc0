"""Cross-entropy of a linear head. See `linear_cross_entropy_sum`."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LossMode = Literal["auto", "dense", "chunked"]


def linear_cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor, *, mode: LossMode = "auto", soft_cap: float | None = None) -> Tensor:
    """Sum over tokens of −log softmax(hidden · weightᵀ)[label], an fp32 scalar. hidden (N, C), weight (V, C), labels (N,); -100 is skipped."""
    logits = F.linear(hidden, weight).float()
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
