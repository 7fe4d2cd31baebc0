"""The modules of low-rank adapters: two factors, and the linear map and the embedding that have some beside
their matrix.

What they compute and how they are named is said in `lora`, which gives them to models.
"""

from __future__ import annotations

import math
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_trainer.model.adapters.nf4 import product
from llm_trainer.model.transformer import Embedding, Linear


class LowRank(nn.Module):
    """The factors of one adapter of one matrix: `a` (rank, in) and `b` (out, rank)."""

    def __init__(self, weight: Tensor, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.a = nn.Parameter(weight.new_empty(rank, inputs))
        self.b = nn.Parameter(weight.new_zeros(outputs, rank))
        self.scale, self.dropout = scale, dropout

    @property
    def rank(self) -> int:
        """Columns of `b`."""
        return self.b.size(1)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out)."""
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return F.linear(F.linear(x, self.a), self.b) * self.scale

    def delta(self) -> Tensor:
        """What it adds to the matrix, (out, in)."""
        return (self.b @ self.a) * self.scale

    @torch.no_grad()
    def restart(self, named: str, seed: int = 0, first: int = 0) -> None:
        """Draw rows of `a` from `first` on as `nn.Linear` draws its weights, and let the same columns of `b`
        be zero.

        The rows before `first` are drawn too and left: each row has numbers of its own, whatever there was
        when it came.
        """
        if self.a.is_meta:
            return
        bound = 1.0 / math.sqrt(self.a.size(1))
        generator = torch.Generator().manual_seed(zlib.crc32(named.encode(), seed))
        drawn = torch.empty(self.a.shape, device="cpu", dtype=torch.float32).uniform_(
            -bound, bound, generator=generator
        )
        self.a[first:] = drawn[first:].to(self.a)
        self.b[:, first:] = 0.0


class LoraLinear(Linear):
    """A linear map with adapters; `used` names those that count."""

    def __init__(self, base: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.lora = nn.ModuleDict()
        self.used: list[str] = []
        self.training = base.training

    def forward(self, input: Tensor) -> Tensor:  # torch's name
        """(…, in) → (…, out)."""
        return self.adapted(input, product(input, self.weight, self.bias))

    def adapted(self, x: Tensor, y: Tensor) -> Tensor:
        """`y` = x·Wᵀ + bias with what the adapters add."""
        for name in self.used:
            y = y + self.lora[name](x)
        return y

    def effective_weight(self) -> Tensor:
        """The matrix and what the adapters in use add to it."""
        return sum((low_rank_of(self, name).delta() for name in self.used), self.weight)


class LoraEmbedding(Embedding):
    """An embedding with adapters; `used` names those that count."""

    def __init__(self, base: nn.Embedding) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = (
            base.num_embeddings,
            base.embedding_dim,
            base.padding_idx,
        )
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.weight = base.weight
        self.lora = nn.ModuleDict()
        self.used: list[str] = []
        self.training = base.training

    def forward(self, input: Tensor) -> Tensor:  # torch's name
        """Ids (…) → (…, C)."""
        y = F.embedding(input, self.weight)
        for name in self.used:
            low = low_rank_of(self, name)
            y = y + (F.embedding(input, low.b) @ low.a) * low.scale
        return y


Adapted = LoraLinear | LoraEmbedding


def low_rank_of(module: Adapted, name: str) -> LowRank:
    """A module's adapter in a set that it is in."""
    found = module.lora[name]
    assert isinstance(found, LowRank)
    return found
