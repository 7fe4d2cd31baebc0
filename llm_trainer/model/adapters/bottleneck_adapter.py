"""Bottleneck adapters after each block (Houlsby et al. 2019, arXiv:1902.00751): one for all texts, or one per
domain.

An adapter adds up·gelu(down·x) to the residual stream. `up` starts at zero, so that a model with new adapters
computes what it did without them. The adapters of all domains are one tensor, from which each row of a batch
takes its own. So a batch may mix domains in one product, and every rank has a gradient for every parameter
whatever its batch holds. Where one row holds documents of several domains, each token goes through all
adapters at once and keeps the result of its own: one product as wide as all of them, instead of gathering a
matrix per token.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_trainer.errors import UsageError

# The adapter of each row (B,) int64, of each token (B, T), one for all rows, or none.
AdapterIndex = Tensor | int | None


class BottleneckAdapter(nn.Module):
    """The adapters after one block: `down` (count, inner, C) and `up` (count, C, inner)."""

    def __init__(self, count: int, width: int, inner: int) -> None:
        """Allocate the adapters; `reset` draws their weights.

        Args:
            count: Number of adapters.
            width: C, features of the residual stream.
            inner: Features of the bottleneck.
        """
        super().__init__()
        self.down = nn.Parameter(torch.empty(count, inner, width))
        self.up = nn.Parameter(torch.zeros(count, width, inner))

    def forward(self, x: Tensor, index: AdapterIndex) -> Tensor:
        """Add the output of the chosen adapters.

        Args:
            x: (B, T, C).
            index: The adapter of all rows, of each row, (B,), or of each token, (B, T), with -1 for none.

        Returns:
            (B, T, C).
        """
        if index is None:
            return x
        if isinstance(index, int):
            return x + F.linear(F.gelu(F.linear(x, self.down[index])), self.up[index])
        if index.dim() == 2:
            return x + self._per_token(x, index)
        inner = F.gelu(torch.bmm(x, self.down[index].mT.to(x.dtype)))  # (B, T, inner)
        return x + torch.bmm(inner, self.up[index].mT.to(inner.dtype))

    def _per_token(self, x: Tensor, index: Tensor) -> Tensor:
        """x (B, T, C), index (B, T), -1 for none → what each token's adapter adds, (B, T, C)."""
        inner = F.gelu(F.linear(x, self.down.flatten(0, 1)))
        inner = inner.view(*x.shape[:2], *self.down.shape[:2])  # (B, T, count, inner)
        own = (index[..., None] == torch.arange(self.down.size(0), device=index.device)).to(inner.dtype)
        return F.linear((inner * own[..., None]).flatten(-2), self.up.transpose(0, 1).flatten(1))

    @torch.no_grad()
    def reset(self, name: str, deviation: float) -> None:
        """Draw `down` again and set `up` to zero.

        Args:
            name: The module's name in the model; it is the seed, so that all ranks draw the same numbers.
            deviation: Standard deviation of `down`.
        """
        if not self.down.is_meta:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            drawn = torch.empty(self.down.shape, device="cpu", dtype=torch.float32)
            self.down.copy_(drawn.normal_(0.0, deviation, generator=generator))
            self.up.zero_()


def domain_indices(known: Sequence[str], names: Sequence[str], numbers: Tensor | None = None) -> Tensor:
    """The adapter that each row or token takes.

    Tokens of an unknown domain, such as held-out text of a corpus that is not trained on, get -1.

    Args:
        known: The domains that have adapters, in order.
        names: The domain of each row, or, with `numbers`, the domains that these count.
        numbers: Index in `names` of each row, (B,), or each token, (B, T).

    Returns:
        Index in `known`, (B,) or (B, T) int64.

    Raises:
        UsageError: A row's domain is unknown.
    """
    if numbers is not None and numbers.dim() == 2:
        return torch.tensor([known.index(name) if name in known else -1 for name in names])[numbers]
    rows = names if numbers is None else [names[number] for number in numbers.tolist()]
    unknown = next((name for name in rows if name not in known), None)
    if unknown is not None:
        domains = ", ".join(known) or "none"
        raise UsageError(f"the model has no adapter for the domain {unknown!r}; its domains are: {domains}")
    return torch.tensor([known.index(name) for name in rows])
