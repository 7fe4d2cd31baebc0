"""Attention of a part of each sequence, without processes: the parts together are the whole, gradients too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm_trainer.config import ModelConfig, TrainingConfig
from llm_trainer.distributed.context_parallel import ContextParallelShard, token_positions
from llm_trainer.model.attention import attention
from llm_trainer.model.positional import sequence_mask
from llm_trainer.training.memory.memory_estimator import step_memory

LENGTH, HEADS, KV_HEADS, WIDTH = 24, 4, 2, 8


def in_parts(
    queries: Tensor, keys: Tensor, values: Tensor, ranks: int, window: int | None, documents: Tensor | None
) -> Tensor:
    """The attention of all ranks, each of its own tokens, put together again."""
    places = [token_positions(rank, ranks, LENGTH) for rank in range(ranks)]
    gathered = torch.cat([torch.stack((keys[:, :, own], values[:, :, own])) for own in places])
    whole = torch.zeros_like(queries)
    for rank, own in enumerate(places):
        share = ContextParallelShard(rank, ranks, lambda _: gathered)
        assert share.token_positions(len(own), own.device)[0] == LENGTH
        mask = sequence_mask(LENGTH, window, documents, own.device, queries.dtype, own)
        whole = whole.index_copy(
            2, own, share.attention(queries[:, :, own], keys[:, :, own], values[:, :, own], mask)
        )
    return whole


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_the_parts_of_a_sequence_attend_as_the_whole(ranks: int, window: int | None, packed: bool) -> None:
    torch.manual_seed(0)
    shapes = [(2, heads, LENGTH, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    documents = torch.arange(LENGTH).div(7, rounding_mode="floor").expand(2, LENGTH) if packed else None
    above = torch.randn(shapes[0], dtype=torch.float64)
    mask = sequence_mask(LENGTH, window, documents, torch.device("cpu"), torch.float64)
    expected = attention(*inputs, mask)
    found = in_parts(*inputs, ranks, window, documents)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected, inputs, above)
    for one, other in zip(torch.autograd.grad(found, inputs, above), wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_each_token_is_one_ranks_and_all_attend_equally_much(ranks: int) -> None:
    length = 2 * ranks * 5
    places = [token_positions(rank, ranks, length) for rank in range(ranks)]
    assert sorted(int(place) for one in places for place in one) == list(range(length))
    assert {int((one + 1).sum()) for one in places} == {length * (length + 1) // 2 // ranks}


def test_a_step_is_estimated_smaller_where_ranks_share_its_sequences() -> None:
    """More than the part of its activations, by the keys and values that are gathered."""
    shape = ModelConfig(vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=512)
    whole, shared = (
        step_memory(shape, TrainingConfig(context_parallel=parts, precision="fp32"), sequences=4).activations
        for parts in (1, 4)
    )
    assert whole / 4 < shared < whole / 1.5
