"""Bottleneck adapters behind each block (Houlsby et al. 2019, arXiv:1902.00751), one for all texts or one for
each domain.

An adapter adds up·gelu(down·x) to the residual stream. `up` starts at zero, so that a model with new adapters
computes what it did without. The adapters of all domains are one tensor from which each row of a batch takes
its own: a batch may mix domains in one product, and every rank has a gradient for every parameter whatever
its batch holds. Where one row holds documents of several domains, each place goes through all adapters side
by side and keeps what its own says: one product as wide as all, and no matrices gathered by place.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_trainer.errors import UsageError

Choice = (
    Tensor | int | None
)  # the adapter of each row (B,) int64, of each place (B, T), one for all rows, or none


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
        if choice.dim() == 2:
            return x + self._by_place(x, choice)
        inner = F.gelu(torch.bmm(x, self.down[choice].mT.to(x.dtype)))  # (B, T, inner)
        return x + torch.bmm(inner, self.up[choice].mT.to(inner.dtype))

    def _by_place(self, x: Tensor, choice: Tensor) -> Tensor:
        """x (B, T, C), choice (B, T), -1 for none → what each place's adapter adds, (B, T, C)."""
        inner = F.gelu(F.linear(x, self.down.flatten(0, 1))).view(
            *x.shape[:2], *self.down.shape[:2]
        )  # (B, T, count, inner)
        own = (choice[..., None] == torch.arange(self.down.size(0), device=choice.device)).to(inner.dtype)
        return F.linear((inner * own[..., None]).flatten(-2), self.up.transpose(0, 1).flatten(1))

    @torch.no_grad()
    def restart(self, seed: str, deviation: float) -> None:
        """Draw `down` from a seed that is the adapter's name, alike on all ranks; `up` is zero."""
        if not self.down.is_meta:
            generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
            self.down.copy_(
                torch.empty(self.down.shape, device="cpu", dtype=torch.float32).normal_(
                    0.0, deviation, generator=generator
                )
            )
            self.up.zero_()


def chosen_domains(known: Sequence[str], names: Sequence[str], numbers: Tensor | None = None) -> Tensor:
    """Numbers in `known` of rows, (B,), with these names, or with those that `numbers` count in `names`, by
    row (B,) or by place (B, T).

    Places of a domain that is not known, as of held-out text of a corpus that nothing is learned from, get
    -1. Raises UsageError for rows.
    """
    if numbers is not None and numbers.dim() == 2:
        return torch.tensor([known.index(name) if name in known else -1 for name in names])[numbers]
    rows = names if numbers is None else [names[number] for number in numbers.tolist()]
    unknown = next((name for name in rows if name not in known), None)
    if unknown is not None:
        there = ", ".join(known) or "none"
        raise UsageError(f"the model has no adapter for the domain {unknown!r}; those that it has: {there}")
    return torch.tensor([known.index(name) for name in rows])
