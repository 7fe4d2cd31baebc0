"""Attention under context parallelism equals attention over the full sequence, gradients included."""

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


def attention_in_parts(
    queries: Tensor, keys: Tensor, values: Tensor, ranks: int, window: int | None, documents: Tensor | None
) -> Tensor:
    """The attention output of all ranks, each for its own tokens, reassembled."""
    positions = [token_positions(rank, ranks, LENGTH) for rank in range(ranks)]
    gathered = torch.cat([torch.stack((keys[:, :, own], values[:, :, own])) for own in positions])
    output = torch.zeros_like(queries)
    for rank, own in enumerate(positions):
        shard = ContextParallelShard(rank, ranks, lambda _: gathered)
        assert shard.token_positions(len(own), own.device)[0] == LENGTH
        mask = sequence_mask(LENGTH, window, documents, own.device, queries.dtype, own)
        output = output.index_copy(
            2, own, shard.attention(queries[:, :, own], keys[:, :, own], values[:, :, own], mask)
        )
    return output


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_sharded_attention_equals_attention_over_the_full_sequence(
    ranks: int, window: int | None, packed: bool
) -> None:
    torch.manual_seed(0)
    shapes = [(2, heads, LENGTH, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    documents = torch.arange(LENGTH).div(7, rounding_mode="floor").expand(2, LENGTH) if packed else None
    grad_output = torch.randn(shapes[0], dtype=torch.float64)
    mask = sequence_mask(LENGTH, window, documents, torch.device("cpu"), torch.float64)
    expected = attention(*inputs, mask)
    found = attention_in_parts(*inputs, ranks, window, documents)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected, inputs, grad_output)
    for one, other in zip(torch.autograd.grad(found, inputs, grad_output), wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_each_token_belongs_to_one_rank_and_all_ranks_have_equal_work(ranks: int) -> None:
    length = 2 * ranks * 5
    positions = [token_positions(rank, ranks, length) for rank in range(ranks)]
    assert sorted(int(position) for one in positions for position in one) == list(range(length))
    assert {int((one + 1).sum()) for one in positions} == {length * (length + 1) // 2 // ranks}


def test_context_parallelism_reduces_the_estimated_activations() -> None:
    """By less than the number of ranks, because keys and values are gathered."""
    config = ModelConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=512
    )
    full, sharded = (
        step_memory(config, TrainingConfig(context_parallel=parts, precision="fp32"), sequences=4).activations
        for parts in (1, 4)
    )
    assert full / 4 < sharded < full / 1.5
