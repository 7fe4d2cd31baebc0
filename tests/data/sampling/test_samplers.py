"""The training order is a function of the data, the seed and the sample number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_trainer.data.hashing import derive_key
from llm_trainer.data.prepared_dataset import open_prepared_dataset
from llm_trainer.data.sampling.batch import IGNORE_INDEX, Batch
from llm_trainer.data.sampling.packing import Packing
from llm_trainer.data.sampling.permutation import KeyedPermutation
from llm_trainer.data.sampling.samplers import validation_batches
from llm_trainer.data.sampling.window_sampler import WindowSampler
from llm_trainer.data.token_shards import ShardWriter, TokenDataset
from llm_trainer.errors import DataError


def stream(size: int) -> TokenDataset:
    """Ids 0, 1, 2, …: each id is its own offset."""
    return TokenDataset.from_ids(range(size), vocab_size=size)


def documents(
    folder: Path, lengths: list[int], *, end: int | None, shard_tokens: int = 2**27
) -> TokenDataset:
    """Documents of distinct ids from 1 on."""
    next_id = 1
    with ShardWriter(
        folder, "train", vocab_size=10_000, tokenizer_hash="0" * 64, eos_id=end, shard_tokens=shard_tokens
    ) as writer:
        for length in lengths:
            writer.add(range(next_id, next_id + length))
            writer.end_document()
            next_id += length
    return TokenDataset.open(folder, "train")


@settings(max_examples=200)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_the_permutation_is_a_bijection(size: int, key: int) -> None:
    assert sorted(KeyedPermutation(size, key)(np.arange(size)).tolist()) == list(range(size))


def test_the_permutation_works_for_sizes_too_large_to_store() -> None:
    order = KeyedPermutation(10**15 + 37, 5)
    places = order(np.arange(10**14, 10**14 + 1000))
    assert len(set(places.tolist())) == 1000
    assert places.min() >= 0
    assert places.max() < 10**15 + 37


@given(size=st.integers(2, 500), key=st.integers(0, 2**32), data=st.data())
def test_indices_are_permuted_alike_alone_and_in_arrays(size: int, key: int, data: st.DataObject) -> None:
    order = KeyedPermutation(size, key)
    asked = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20))
    assert order(np.array(asked)).tolist() == [int(order(np.array([i]))[0]) for i in asked]


def test_every_position_is_about_equally_likely_over_many_keys() -> None:
    size, keys = 10, 4000
    counts = np.zeros((size, size))
    for key in range(keys):
        counts[np.arange(size), KeyedPermutation(size, derive_key(key, 0))(np.arange(size))] += 1
    expected = keys / size
    chi_square = ((counts - expected) ** 2 / expected).sum(
        axis=1
    )  # 9 degrees of freedom each: 99.99 % lie below 33.7
    assert chi_square.max() < 40


def test_neighbours_do_not_stay_neighbours() -> None:
    places = KeyedPermutation(100_000, 3)(np.arange(100_000))
    assert abs(np.corrcoef(np.arange(100_000), places)[0, 1]) < 0.02
    assert (np.abs(np.diff(places)) == 1).mean() < 0.001


@pytest.mark.parametrize("context", [4, 7, 64])
def test_an_epoch_reads_every_window_once_and_no_label_twice(context: int) -> None:
    sampler = WindowSampler(stream(1000), context, seed=1)
    for epoch in range(3):
        batch = sampler.batch(epoch * sampler.samples_per_epoch, sampler.samples_per_epoch)
        labels = batch.labels.flatten().tolist()
        assert len(set(labels)) == len(labels) > 1000 - 2 * context - 1
        assert torch.equal(batch.labels, batch.input_ids + 1)


@settings(max_examples=50)
@given(
    first=st.integers(0, 400),
    cuts=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    seed=st.integers(0, 2**32),
)
def test_any_slicing_gives_the_same_samples(first: int, cuts: list[int], seed: int) -> None:
    sampler, fresh = WindowSampler(stream(1000), 8, seed), WindowSampler(stream(1000), 8, seed)
    whole = sampler.batch(first, sum(cuts)).input_ids
    places = [first + sum(cuts[:n]) for n in range(len(cuts))]
    parts = [
        fresh.batch(place, count).input_ids for place, count in reversed(list(zip(places, cuts, strict=True)))
    ]
    assert torch.equal(whole, torch.cat(parts[::-1]))


def test_seeds_and_epochs_give_other_orders() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = WindowSampler(stream(1000), 8, seed)
        numbers = np.arange(sampler.samples_per_epoch) + epoch * sampler.samples_per_epoch
        return sampler.locate(numbers)[1].tolist()

    orders = [order(seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert len({tuple(found) for found in orders}) == 4
    assert len({found[0] % 8 for seed in range(20) for found in [order(seed, 0)]}) > 1  # the grid moves


def test_the_samples_of_a_seed_are_pinned() -> None:
    """A change here breaks every resumed run, so it must be intended."""
    assert WindowSampler(stream(1000), 8, 1337).locate(np.arange(6))[1].tolist() == [
        664,
        208,
        568,
        56,
        496,
        96,
    ]


def test_a_short_stream_is_used_completely_and_one_that_is_too_short_is_refused() -> None:
    assert WindowSampler(stream(9), 8, 0).batch(0, 2).labels.tolist() == [list(range(1, 9))] * 2
    with pytest.raises(DataError, match=r"8 training tokens.*window of 8.*at most 7"):
        WindowSampler(stream(8), 8, 0)


def test_a_single_document_has_no_document_ids(tmp_path: Path) -> None:
    assert WindowSampler(stream(100), 8, 0).batch(0, 2).document_ids is None
    several = documents(tmp_path, [10, 10, 10], end=0)
    assert WindowSampler(several, 8, 0, mask_documents=False).batch(0, 2).document_ids is None
    assert WindowSampler(several, 8, 0).batch(0, 2).document_ids is not None


@pytest.mark.parametrize("shard_tokens", [1, 2**27])
def test_the_end_of_text_is_a_label_and_precedes_the_next_document(tmp_path: Path, shard_tokens: int) -> None:
    tokens = documents(
        tmp_path, [2, 3, 1, 4], end=0, shard_tokens=shard_tokens
    )  # 1 2 0 | 3 4 5 0 | 6 0 | 7 8 9 10 0
    (batch,) = validation_batches(tokens, 13, 1)
    assert batch.input_ids.tolist() == [[1, 2, 0, 3, 4, 5, 0, 6, 0, 7, 8, 9, 10]]
    assert batch.labels.tolist() == [[2, 0, 3, 4, 5, 0, 6, 0, 7, 8, 9, 10, 0]]
    assert batch.document_ids is not None
    assert batch.document_ids.tolist() == [[0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3]]
    assert batch.num_supervised == 13


def test_without_an_end_of_text_nothing_is_predicted_across_documents(tmp_path: Path) -> None:
    tokens = documents(tmp_path, [2, 3, 1, 4], end=None)  # 1 2 | 3 4 5 | 6 | 7 8 9 10
    (batch,) = validation_batches(tokens, 9, 1)
    assert batch.document_ids is not None
    assert batch.document_ids.tolist() == [[0, 0, 1, 1, 1, 2, 3, 3, 3]]
    assert batch.labels.tolist() == [[2, IGNORE_INDEX, 4, 5, IGNORE_INDEX, IGNORE_INDEX, 8, 9, 10]]
    assert batch.num_supervised == 6
    (unmasked,) = validation_batches(tokens, 9, 1, packing=Packing(mask_documents=False))
    assert (unmasked.labels != IGNORE_INDEX).all()


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=2, max_size=20),
    context=st.integers(1, 12),
    has_eos=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rows_and_labels_always_fit_the_documents(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], context: int, has_eos: bool, seed: int
) -> None:
    tokens = documents(tmp_path_factory.mktemp("d"), lengths, end=0 if has_eos else None)
    if len(tokens) <= context:
        return
    sampler = WindowSampler(tokens, context, seed)
    starts = sampler.locate(np.arange(7))[1].tolist()
    batch = sampler.batch(0, 7)
    owner = np.repeat(
        np.arange(len(lengths)), [length + has_eos for length in lengths]
    )  # of each id as a label
    ids = tokens.read(0, len(tokens))
    assert batch.document_ids is not None
    for row, start in enumerate(starts):
        reads = owner[start : start + context] + (
            ids[start : start + context] == 0
        )  # an end, as an input, is the next one's
        says = batch.document_ids[row].numpy()
        assert (says == np.searchsorted(np.unique(reads), reads)).all()
        crosses = reads != owner[start + 1 : start + context + 1]
        expected = np.where(crosses, IGNORE_INDEX, ids[start + 1 : start + context + 1])
        expected = expected if not has_eos else ids[start + 1 : start + context + 1]
        assert batch.labels[row].tolist() == expected.tolist()
    assert batch.num_supervised == int((batch.labels != IGNORE_INDEX).sum())


@pytest.mark.parametrize("batch_size", [1, 3, 8, 1000])
def test_validation_reads_every_token_once_for_any_batch_size(tiny_data: Path, batch_size: int) -> None:
    tokens = open_prepared_dataset(tiny_data).validation
    assert tokens is not None
    batches = list(validation_batches(tokens, 16, batch_size))
    labels = torch.cat([batch.labels.flatten() for batch in batches])
    assert (
        labels[labels != IGNORE_INDEX].tolist() == tokens.read(1, len(tokens) - 1).tolist()
    )  # a last part shorter than a window too
    assert sum(batch.num_supervised for batch in batches) == len(tokens) - 1
    assert (
        len({batch.input_ids.shape for batch in batches}) == 1
    )  # no shape that a compiled model has not seen


def test_limited_validation_is_spread_over_the_split() -> None:
    batches = list(validation_batches(stream(1001), 10, 4, limit=3))
    starts = torch.cat([batch.input_ids[:, 0] for batch in batches]).tolist()
    assert starts == [i * 100 // 12 * 10 for i in range(12)]
    assert len(list(validation_batches(stream(1001), 10, 4, limit=1000))) == 25


def test_validation_shorter_than_a_window_is_still_measured() -> None:
    (batch,) = validation_batches(stream(5), 8, 4)
    assert batch.labels.tolist() == [[1, 2, 3, 4, *[IGNORE_INDEX] * 4]]
    assert batch.num_supervised == 4
    with pytest.raises(DataError, match="val_ratio"):
        next(validation_batches(stream(1), 8, 4))


def test_all_tensors_of_a_batch_move(tmp_path: Path) -> None:
    batch = WindowSampler(documents(tmp_path, [9, 9], end=0), 4, 0).batch(0, 3)
    assert batch.to("cpu") is batch
    moved: Batch = batch.to("meta")
    assert moved.document_ids is not None
    assert {moved.input_ids.device.type, moved.labels.device.type, moved.document_ids.device.type} == {"meta"}
    assert (len(moved), moved.num_supervised) == (3, batch.num_supervised)


def test_several_threads_read_one_sampler(tiny_data: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    sampler = WindowSampler(open_prepared_dataset(tiny_data).train, 32, 7)
    jobs = [n * 5 for n in range(60)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda first: sampler.batch(first, 5).input_ids, jobs))
    assert all(
        torch.equal(ids, sampler.batch(first, 5).input_ids) for first, ids in zip(jobs, together, strict=True)
    )
