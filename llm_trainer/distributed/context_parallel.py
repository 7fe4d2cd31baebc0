"""Context parallelism: each sequence cut over a group of ranks, which see parts of it and attend to all of
it.

Everything but attention is done token by token, so a rank needs the others' keys and values and nothing else:
they are gathered in each layer, and their gradients summed back in the backward pass, by a DTensor's change
of placement. (Ring attention, Liu et al. 2023, arXiv:2310.01889, holds fewer at a time; torch's is
experimental, knows CUDA alone and neither documents nor windows. Llama 3 was trained by gathering,
arXiv:2407.21783, section 3.3.2: keys and values are few under grouped heads, and masks may be any.)

Later tokens attend to more. So a sequence is cut in 2 × n pieces, and rank r has number r and number r from
the end: all ranks have equally much to do, since a piece attends to the pieces up to its own only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llm_trainer.data.sampling.samplers import IGNORED, Batch
from llm_trainer.distributed.process_group import Ranks
from llm_trainer.model.attention import attend

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def places_of(rank: int, ranks: int, length: int, device: torch.device | None = None) -> Tensor:
    """Which tokens of a sequence are a rank's, (length / ranks,) int64: two pieces. `length` is a multiple of
    2 × `ranks`.
    """
    size = length // (2 * ranks)
    return torch.cat(
        [torch.arange(piece * size, (piece + 1) * size, device=device) for piece in _pieces(rank, ranks)]
    )


def part_of(batch: Batch, ranks: Ranks) -> Batch:
    """What this rank sees of a batch: its tokens and their labels. Document ids stay whole, as masks need
    those of all.
    """
    count = ranks.plan.context_parallel
    if count == 1:
        return batch
    places = places_of(ranks.plan.context_rank(ranks.rank), count, batch.labels.size(1))
    labels, sources = batch.labels[:, places], batch.sources
    if sources is not None and sources.numbers.dim() == 2:
        sources = replace(sources, numbers=sources.numbers[:, places])
    supervised = int((labels != IGNORED).sum())
    return replace(
        batch, input_ids=batch.input_ids[:, places], labels=labels, num_supervised=supervised, sources=sources
    )


def share_over(mesh: DeviceMesh) -> ContextShare:
    """This rank's part of sequences that are cut over the ranks of `mesh` (one dimension)."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    def gather(own: Tensor) -> Tensor:
        cut = DTensor.from_local(own, mesh, [Shard(0)], run_check=False)
        return cut.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])

    return ContextShare(mesh.get_local_rank(), mesh.size(), gather)


class ContextShare:
    """The part of each sequence that `rank` of `ranks` has: the model's `Share`. `gather` joins the tensors
    of all ranks along their first dimension, and sums gradients back.
    """

    def __init__(self, rank: int, ranks: int, gather: Callable[[Tensor], Tensor]) -> None:
        self._rank, self._ranks, self._gather = rank, ranks, gather
        self._masks: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def places(self, count: int, device: torch.device) -> tuple[int, Tensor]:
        """How long sequences are of which `count` tokens are here, and where in them these stand."""
        return count * self._ranks, places_of(self._rank, self._ranks, count * self._ranks, device)

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, dropout: float = 0.0
    ) -> Tensor:
        """Attention of this rank's tokens to those of all, each piece to what is not after it. A collective
        call, backward too.

        queries (B, H, T, D), keys and values (B, KV, T, D), of this rank's T tokens → (B, H, T, D). mask:
        additive, broadcastable to (B, H, T, T × ranks), or None for causal attention.
        """
        size = queries.size(2) // 2
        keys, values = self._gathered(keys, values)
        attended = []
        for number, piece in enumerate(_pieces(self._rank, self._ranks)):
            own, stop = slice(number * size, (number + 1) * size), (piece + 1) * size
            visible = self._causal(size, stop, queries) if mask is None else mask[..., own, :stop]
            attended.append(
                attend(queries[:, :, own], keys[:, :, :stop], values[:, :, :stop], visible, dropout)
            )
        return torch.cat(attended, dim=2)

    def _gathered(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, KV, T, D) of all ranks' tokens, in the sequence's order, up to the last that
        this rank's tokens see.
        """
        both = torch.stack((keys, values))
        of_ranks = (
            self._gather(both).view(self._ranks, *both.shape).chunk(2, dim=-2)
        )  # the first piece of each, and the second
        seen = 2 * self._ranks - self._rank
        in_order = [of_ranks[place][rank] for place, rank in self._holders()[:seen]]
        found = torch.cat(in_order, dim=-2)
        return found[0], found[1]

    def _holders(self) -> list[tuple[int, int]]:
        """Of each piece of a sequence, whether it is its rank's first or second (0, 1), and that rank."""
        ranks = range(self._ranks)
        return [(0, rank) for rank in ranks] + [(1, rank) for rank in reversed(ranks)]

    def _causal(self, count: int, stop: int, like: Tensor) -> Tensor | None:
        """The mask of `count` tokens, the last of the `stop` that they see."""
        if count == stop:
            return None
        if like.is_cuda:
            from torch.nn.attention.bias import causal_lower_right

            return causal_lower_right(count, stop)  # for the kernels there a flag, not numbers
        key = (count, stop, like.dtype)
        if key not in self._masks:
            later = torch.ones(count, stop, dtype=torch.bool, device=like.device).triu(stop - count + 1)
            self._masks[key] = torch.zeros(count, stop, dtype=like.dtype, device=like.device).masked_fill(
                later, -torch.inf
            )
        return self._masks[key]


def _pieces(rank: int, ranks: int) -> tuple[int, int]:
    return rank, 2 * ranks - 1 - rank
