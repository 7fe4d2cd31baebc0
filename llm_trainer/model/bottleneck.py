"""Bottleneck adapters behind each block (Houlsby et al. 2019, arXiv:1902.00751), one for all texts or one for each domain.

An adapter adds up·gelu(down·x) to the residual stream. `up` starts at zero, so that a model with new adapters computes what it did
without. The adapters of all domains are one tensor from which each row of a batch takes its own: a batch may mix domains in one product,
and every rank has a gradient for every parameter whatever its batch holds.
"""

from __future__ import annotations

import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Choice = Tensor | int | None  # the adapter of each row (B,) int64, one for all rows, or none


class Bottleneck(nn.Module):
    """`count` adapters of one place: `down` (count, inner, C) and `up` (count, C, inner)."""

    def __init__(self, count: int, width: int, inner: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(count, inner, width))
        self.up = nn.Parameter(torch.zeros(count, width, inner))

    def forward(self, x: Tensor, choice: Choice) -> Tensor:
        """x (B, T, C) → (B, T, C)."""
        if choice is None:
            return x
        if isinstance(choice, int):
            return x + F.linear(F.gelu(F.linear(x, self.down[choice])), self.up[choice])
        inner = F.gelu(torch.bmm(x, self.down[choice].mT.to(x.dtype)))  # (B, T, inner)
        return x + torch.bmm(inner, self.up[choice].mT.to(inner.dtype))

    @torch.no_grad()
    def restart(self, seed: str, deviation: float) -> None:
        """Draw `down` from a seed that is the adapter's name, alike on all ranks; `up` is zero."""
        if not self.down.is_meta:
            generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
            self.down.copy_(torch.empty(self.down.shape, device="cpu", dtype=torch.float32).normal_(0.0, deviation, generator=generator))
            self.up.zero_()
