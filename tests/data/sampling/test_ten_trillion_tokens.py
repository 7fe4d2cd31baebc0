"""The training order works for 10¹³ tokens.

The arrays have no data: every id of a shard is the same byte of memory.
"""

from __future__ import annotations

import numpy as np
import pytest

from llm_trainer.data.sampling.window_sampler import WindowSampler
from llm_trainer.data.token_shards import TokenDataset

SHARDS, SHARD_TOKENS, CONTEXT = 1000, 10**10 + 7, 4096


@pytest.fixture(scope="module")
def tokens() -> TokenDataset:
    """Shard i consists of the id i and is one document."""
    ids = [np.broadcast_to(np.uint16(number), (SHARD_TOKENS,)) for number in range(SHARDS)]
    starts = [np.zeros(1, dtype=np.uint64)] * SHARDS
    return TokenDataset(
        ids, starts, vocab_size=SHARDS, tokenizer_hash="0" * 64, fingerprint="sparse", largest_id=SHARDS - 1
    )


def test_a_stream_of_ten_trillion_tokens_is_counted_and_read_at_its_end(tokens: TokenDataset) -> None:
    assert tokens.num_tokens == SHARDS * SHARD_TOKENS > 10**13
    border = 999 * SHARD_TOKENS
    assert tokens.read(border - 2, 4).tolist() == [998, 998, 999, 999]
    assert tokens.read(tokens.num_tokens - 3, 3).tolist() == [999] * 3


def test_samples_are_distinct_and_inside_and_their_ids_match_their_offsets(tokens: TokenDataset) -> None:
    sampler = WindowSampler(tokens, CONTEXT, seed=1)
    assert sampler.samples_per_epoch > 2 * 10**9  # more than 31 bits number
    numbers = np.concatenate([np.arange(5000), sampler.samples_per_epoch - 1 - np.arange(5000)])
    starts = sampler.locate(numbers)[1]
    assert starts.min() >= 0
    assert starts.max() + CONTEXT < tokens.num_tokens
    assert np.diff(np.sort(starts)).min() >= CONTEXT  # none twice, none overlapping
    assert starts.max() > 0.99 * tokens.num_tokens  # spread over all of it
    batch = sampler.batch(sampler.samples_per_epoch - 4, 4)
    last = np.arange(sampler.samples_per_epoch - 4, sampler.samples_per_epoch)
    assert batch.input_ids[:, 0].tolist() == (sampler.locate(last)[1] // SHARD_TOKENS).tolist()


def test_later_epochs_take_no_longer_than_the_first(tokens: TokenDataset) -> None:
    sampler = WindowSampler(tokens, CONTEXT, seed=1)
    first = 3 * sampler.samples_per_epoch + 12345
    alone = sampler.batch(first + 1, 1)
    assert sampler.batch(first, 2).input_ids[1].tolist() == alone.input_ids[0].tolist()
