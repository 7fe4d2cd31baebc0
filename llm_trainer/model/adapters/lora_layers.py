"""The modules of low-rank adapters: a pair of factors, and the linear map and the embedding that carry some.

`lora` documents what they compute and how they are named, and puts them into models.
"""

from __future__ import annotations

import math
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_trainer.model.adapters.nf4 import nf4_linear
from llm_trainer.model.layers import Embedding, Linear


class LoraFactors(nn.Module):
    """The factors of one adapter of one matrix: `a` (rank, in) and `b` (out, rank)."""

    def __init__(self, weight: Tensor, rank: int, scale: float, dropout: float = 0.0) -> None:
        """Allocate the factors; `reset` draws them.

        Args:
            weight: The matrix under the adapter, (out, in), whose device and type the factors take.
            rank: Their rank.
            scale: What their product is multiplied by.
            dropout: Dropout on what the adapter reads, in training.
        """
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
        """What the adapter adds to the matrix, (out, in)."""
        return (self.b @ self.a) * self.scale

    @torch.no_grad()
    def reset(self, name: str, seed: int = 0, first: int = 0) -> None:
        """Draw rows of `a` as `nn.Linear` draws its weights, and set the same columns of `b` to zero.

        Rows before `first` are drawn too and not stored: each row has numbers of its own, whenever it was
        added.

        Args:
            name: Set and target of the adapter; part of the seed.
            seed: The other part of the seed.
            first: The first row to draw.
        """
        if self.a.is_meta:
            return
        bound = 1.0 / math.sqrt(self.a.size(1))
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))
        drawn = torch.empty(self.a.shape, device="cpu", dtype=torch.float32)
        drawn.uniform_(-bound, bound, generator=generator)
        self.a[first:] = drawn[first:].to(self.a)
        self.b[:, first:] = 0.0


class LoraLinear(Linear):
    """A linear map with adapters; `active` names those that are added."""

    def __init__(self, base: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.lora = nn.ModuleDict()
        self.active: list[str] = []
        self.training = base.training

    def forward(self, input: Tensor) -> Tensor:  # torch's name
        """(…, in) → (…, out)."""
        return self.apply_adapters(input, nf4_linear(input, self.weight, self.bias))

    def apply_adapters(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the active adapters to `y` = x·Wᵀ + bias, (…, out)."""
        for name in self.active:
            y = y + self.lora[name](x)
        return y

    def effective_weight(self) -> Tensor:
        """The matrix (out, in) with what the active adapters add to it."""
        return sum((lora_factors(self, name).delta() for name in self.active), self.weight)


class LoraEmbedding(Embedding):
    """An embedding with adapters; `active` names those that are added."""

    def __init__(self, base: nn.Embedding) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = base.num_embeddings, base.embedding_dim
        self.padding_idx = base.padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.weight = base.weight
        self.lora = nn.ModuleDict()
        self.active: list[str] = []
        self.training = base.training

    def forward(self, input: Tensor) -> Tensor:  # torch's name
        """Ids (…) → (…, C)."""
        y = F.embedding(input, self.weight)
        for name in self.active:
            factors = lora_factors(self, name)
            y = y + (F.embedding(input, factors.b) @ factors.a) * factors.scale
        return y


LoraModule = LoraLinear | LoraEmbedding


def lora_factors(module: LoraModule, name: str) -> LoraFactors:
    """A module's adapter in the set `name`."""
    found = module.lora[name]
    assert isinstance(found, LoraFactors)
    return found
