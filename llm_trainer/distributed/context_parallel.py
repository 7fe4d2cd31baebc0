"""Context parallelism: each sequence is sharded over a group of ranks, and attention still spans all of it.

Everything but attention works token by token, so a rank needs nothing but the other ranks' keys and values.
They are gathered in each layer, and their gradients are reduced in the backward pass, by a DTensor's change
of placement. (Ring attention, Liu et al. 2023, arXiv:2310.01889, keeps fewer in memory at a time; torch's
implementation is experimental, supports CUDA only, and supports neither packed documents nor sliding
windows. Llama 3 was trained by gathering, arXiv:2407.21783, section 3.3.2: with grouped heads keys and values
are small, and any mask can be used.)

Under causal attention later tokens attend to more. Therefore a sequence is split into 2 × n chunks, and rank
r gets chunk r and the r-th chunk from the end: all ranks then have the same amount of work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llm_trainer.data.sampling.batch import IGNORE_INDEX, Batch
from llm_trainer.distributed.process_group import ProcessGroup
from llm_trainer.model.attention import attention

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def token_positions(rank: int, num_ranks: int, length: int, device: torch.device | None = None) -> Tensor:
    """Return the positions of a rank's tokens in a sequence: its two chunks.

    Args:
        rank: A rank of the context group.
        num_ranks: The size of the context group.
        length: The length of the sequence, a multiple of 2 × `num_ranks`.
        device: Where the result is placed.

    Returns:
        The positions, (length / num_ranks,) int64.
    """
    size = length // (2 * num_ranks)
    return torch.cat(
        [torch.arange(chunk * size, (chunk + 1) * size, device=device) for chunk in _chunks(rank, num_ranks)]
    )


def shard_batch(batch: Batch, process_group: ProcessGroup) -> Batch:
    """Return this rank's tokens of a batch and their labels.

    Document ids are not sharded, because masks need those of all tokens.
    """
    num_ranks = process_group.plan.context_parallel
    if num_ranks == 1:
        return batch
    positions = token_positions(
        process_group.plan.context_rank(process_group.rank), num_ranks, batch.labels.size(1)
    )
    labels, sources = batch.labels[:, positions], batch.sources
    if sources is not None and sources.numbers.dim() == 2:
        sources = replace(sources, numbers=sources.numbers[:, positions])
    return replace(
        batch,
        input_ids=batch.input_ids[:, positions],
        labels=labels,
        num_supervised=int((labels != IGNORE_INDEX).sum()),
        sources=sources,
    )


def build_sequence_shard(mesh: DeviceMesh) -> ContextParallelShard:
    """Return what the model needs to run on this rank's part of sequences sharded over `mesh`.

    Args:
        mesh: The context group, one-dimensional.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    def gather(own: Tensor) -> Tensor:
        sharded = DTensor.from_local(own, mesh, [Shard(0)], run_check=False)
        return sharded.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])

    return ContextParallelShard(mesh.get_local_rank(), mesh.size(), gather)


class ContextParallelShard:
    """One rank's part of each sequence: the model's `SequenceShard` under context parallelism.

    Args:
        rank: This rank of the context group.
        num_ranks: The size of the context group.
        gather: Concatenates the tensors of all ranks along the first dimension; its backward pass sums the
            gradients over ranks.
    """

    def __init__(self, rank: int, num_ranks: int, gather: Callable[[Tensor], Tensor]) -> None:
        self._rank, self._num_ranks, self._gather = rank, num_ranks, gather
        self._masks: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def token_positions(self, count: int, device: torch.device) -> tuple[int, Tensor]:
        """Return the length of the sequences of which this rank has `count` tokens, and their positions."""
        length = count * self._num_ranks
        return length, token_positions(self._rank, self._num_ranks, length, device)

    def attention(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, dropout: float = 0.0
    ) -> Tensor:
        """Attend from this rank's tokens to the tokens of all ranks. A collective call, also backward.

        Each chunk is computed with the keys up to its own end only.

        Args:
            queries: (B, H, T, D), of this rank's T tokens.
            keys: (B, KV, T, D), of the same tokens.
            values: (B, KV, T, D), of the same tokens.
            mask: Additive, broadcastable to (B, H, T, T × num_ranks); None for causal attention.
            dropout: The probability with which attention weights are dropped.

        Returns:
            The attention output, (B, H, T, D).
        """
        size = queries.size(2) // 2
        keys, values = self._gathered(keys, values)
        outputs = []
        for number, chunk in enumerate(_chunks(self._rank, self._num_ranks)):
            own, stop = slice(number * size, (number + 1) * size), (chunk + 1) * size
            visible = self._causal_mask(size, stop, queries) if mask is None else mask[..., own, :stop]
            outputs.append(
                attention(queries[:, :, own], keys[:, :, :stop], values[:, :, :stop], visible, dropout)
            )
        return torch.cat(outputs, dim=2)

    def _gathered(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, KV, T, D) of all ranks in the order of the sequence, up to the last visible."""
        both = torch.stack((keys, values))
        # The first chunk of each rank, and the second.
        chunks = self._gather(both).view(self._num_ranks, *both.shape).chunk(2, dim=-2)
        num_visible = 2 * self._num_ranks - self._rank
        in_order = [chunks[number][rank] for number, rank in self._chunk_owners()[:num_visible]]
        gathered = torch.cat(in_order, dim=-2)
        return gathered[0], gathered[1]

    def _chunk_owners(self) -> list[tuple[int, int]]:
        """For each chunk of a sequence: whether it is its rank's first or second (0, 1), and that rank."""
        ranks = range(self._num_ranks)
        return [(0, rank) for rank in ranks] + [(1, rank) for rank in reversed(ranks)]

    def _causal_mask(self, count: int, stop: int, like: Tensor) -> Tensor | None:
        """The mask of `count` tokens that are the last of the `stop` keys."""
        if count == stop:
            return None
        if like.is_cuda:
            from torch.nn.attention.bias import causal_lower_right

            return causal_lower_right(count, stop)  # CUDA kernels take this as a flag, without a tensor
        key = (count, stop, like.dtype)
        if key not in self._masks:
            later = torch.ones(count, stop, dtype=torch.bool, device=like.device).triu(stop - count + 1)
            self._masks[key] = torch.zeros(count, stop, dtype=like.dtype, device=like.device).masked_fill(
                later, -torch.inf
            )
        return self._masks[key]


def _chunks(rank: int, num_ranks: int) -> tuple[int, int]:
    return rank, 2 * num_ranks - 1 - rank
