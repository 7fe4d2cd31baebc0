"""The mixed order is a function of (seed, sample) with exact proportions over every long window."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_trainer.config.schema.mixture import MixtureStage
from llm_trainer.data.sampling.batch import IGNORE_INDEX, BatchSources, Sampler
from llm_trainer.data.sampling.mixture import PERIOD, MixtureDataset, MixtureSampler
from llm_trainer.data.sampling.packing import Packing
from llm_trainer.data.sampling.samplers import build_sampler
from llm_trainer.data.token_shards import ShardWriter, TokenDataset
from llm_trainer.errors import DataError, UsageError

VOCABULARY = 3000


def row_names(sources: BatchSources | None) -> list[str]:
    """The corpus of each row, where rows come from one corpus each."""
    assert sources is not None
    return [sources.names[number] for number in sources.numbers.tolist()]


def stream(first: int, count: int = 400) -> TokenDataset:
    """Ids from `first` on, so that an id identifies its corpus."""
    return TokenDataset.from_ids(range(first, first + count), vocab_size=VOCABULARY)


def corpora(number: int = 3) -> dict[str, TokenDataset]:
    return {f"c{index}": stream(1000 * index, 200 + 150 * index) for index in range(number)}


def mixed(
    *stages: MixtureStage, seed: int = 0, sequences_per_step: int = 1, number: int = 3
) -> MixtureSampler:
    sampler = build_sampler(
        MixtureDataset(corpora(number), stages), 8, seed, sequences_per_step=sequences_per_step
    )
    assert isinstance(sampler, MixtureSampler)
    return sampler


def weights(*values: float, until: str | None = None) -> MixtureStage:
    return MixtureStage(weights={f"c{index}": value for index, value in enumerate(values)}, until=until)


@settings(max_examples=40)
@given(
    values=st.lists(st.floats(0.001, 1000), min_size=1, max_size=6),
    seed=st.integers(0, 2**32),
    first=st.integers(0, 3 * PERIOD),
    size=st.integers(1, 3000),
)
def test_proportions_are_exact_over_any_window(values: list[float], seed: int, first: int, size: int) -> None:
    sampler = mixed(weights(*values), seed=seed, number=len(values))
    sources, _ = sampler.locate(np.arange(first, first + size))
    counted = np.bincount(sources, minlength=len(values))
    rates = np.array([1 / member.tokens_per_sample for member in sampler._members]) * values
    wanted = rates / rates.sum()
    # A corpus is off by at most twice the number of corpora; the period rounds shares to 1/65,536, and raises
    # the least to that.
    assert np.abs(counted - wanted * size).max() <= 2 * len(values) + 2 + size * len(values) / PERIOD


def test_a_period_has_exactly_the_counts_which_random_draws_would_not() -> None:
    sampler = mixed(weights(0.5, 0.3, 0.2))
    for period in range(3):
        sources, _ = sampler.locate(np.arange(period * PERIOD, (period + 1) * PERIOD))
        assert np.bincount(sources).tolist() == np.bincount(sampler.locate(np.arange(PERIOD))[0]).tolist()
        assert np.abs(np.bincount(sources) / PERIOD - [0.5, 0.3, 0.2]).max() <= 1 / PERIOD


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    ends=st.lists(st.integers(1, 5000), min_size=0, max_size=3, unique=True),
    size=st.integers(1, 8000),
)
def test_each_corpus_is_read_in_its_own_order_without_a_gap_through_all_stages(
    seed: int, ends: list[int], size: int
) -> None:
    shares = [(1, 2, 3), (5, 0, 1), (0, 1, 0), (1, 1, 1)]
    untils = [*(f"{end} steps" for end in sorted(ends)), None]
    sampler = mixed(
        *(weights(*share, until=until) for share, until in zip(shares, untils, strict=False)), seed=seed
    )
    sources, places = sampler.locate(np.arange(size))
    for source in range(3):
        read = places[sources == source]
        assert read.tolist() == list(range(len(read)))


def test_stages_end_where_they_should_and_a_weight_of_0_excludes_a_corpus() -> None:
    sampler = mixed(
        weights(1, 0, 0, until="50 steps"),
        weights(0, 1, 0, until="4000 tokens"),
        weights(0, 0, 1),
        sequences_per_step=4,
    )
    sources, _ = sampler.locate(np.arange(1000))
    assert sources.tolist() == [0] * 200 + [1] * 300 + [2] * 500  # 50 steps of 4; 4000 tokens in rows of 8


def test_any_number_of_ranks_and_any_start_read_the_same_samples() -> None:
    stages = weights(1, 2, 3, until="13 steps"), weights(3, 1, 0)
    whole = mixed(*stages, seed=9, sequences_per_step=8).batch(0, 240)
    for ranks in (1, 2, 3, 4):
        fresh = mixed(*stages, seed=9, sequences_per_step=8)
        share = 24 // ranks
        parts = [
            fresh.batch(step * 24 + rank * share, share)
            for step in reversed(range(10))
            for rank in range(ranks)
        ]
        order = [step * 24 + rank * share for step in reversed(range(10)) for rank in range(ranks)]
        for first, part in zip(order, parts, strict=True):
            assert torch.equal(part.input_ids, whole.input_ids[first : first + share])
            assert whole.sources is not None
            assert part.sources is not None
            assert row_names(part.sources) == row_names(whole.sources)[first : first + share]


def test_a_distant_sample_takes_no_longer_than_a_near_one_and_agrees_with_counting() -> None:
    sampler = mixed(weights(1, 2, 3))
    far = 5 * PERIOD + 77
    sources, _places = sampler.locate(np.arange(far))
    _, at_once = sampler.locate(np.array([far]))
    source = int(sampler.locate(np.array([far]))[0][0])
    assert int(at_once[0]) == int((sources == source).sum())
    assert sampler.locate(np.array([10**14]))[1][0] > 10**12


def test_rows_are_those_of_the_corpora_and_name_their_corpus() -> None:
    sampler = mixed(weights(1, 1, 1), seed=4)
    batch = sampler.batch(10, 50)
    assert batch.sources is not None
    members = corpora()
    alone: dict[str, Sampler] = {name: build_sampler(tokens, 8, 4) for name, tokens in members.items()}
    sources, places = sampler.locate(np.arange(10, 60))
    for row, (source, place) in enumerate(zip(sources.tolist(), places.tolist(), strict=True)):
        name = f"c{source}"
        assert row_names(batch.sources)[row] == name
        assert torch.equal(batch.input_ids[row], alone[name].batch(place, 1).input_ids[0])
        assert set((batch.input_ids[row] // 1000).tolist()) == {source}
    assert batch.num_supervised == int((batch.labels != IGNORE_INDEX).sum())


def test_seeds_and_periods_give_other_orders() -> None:
    def pattern(seed: int, period: int) -> tuple[int, ...]:
        return tuple(
            mixed(weights(1, 1.7, 3.1), seed=seed).locate(np.arange(200) + period * PERIOD)[0].tolist()
        )

    assert len({pattern(seed, period) for seed, period in itertools.product((1, 2), (0, 1))}) == 4


def test_weights_are_fractions_of_the_tokens_also_for_padded_rows(tmp_path: Path) -> None:
    parts = {}
    for name, length in (("short", 3), ("long", 200)):
        with ShardWriter(
            tmp_path / name, "train", vocab_size=VOCABULARY, tokenizer_hash="0" * 64, eos_id=0
        ) as writer:
            for _ in range(6000 // length):
                writer.add([1 if name == "short" else 2] * (length - 1))
                writer.end_document()
        parts[name] = TokenDataset.open(tmp_path / name, "train")
    stage = MixtureStage(weights={"short": 1, "long": 1})
    sampler = build_sampler(MixtureDataset(parts, [stage]), 40, 0, Packing("none"))
    batch = sampler.batch(0, 2 * sampler.samples_per_epoch)
    assert batch.sources is not None
    tokens = {name: 0 for name in parts}
    for name, count in zip(
        row_names(batch.sources), (batch.labels != IGNORE_INDEX).sum(dim=1).tolist(), strict=True
    ):
        tokens[name] += count
    assert tokens["short"] / sum(tokens.values()) == pytest.approx(0.5, abs=0.01)
    assert row_names(batch.sources).count("short") > 10 * row_names(batch.sources).count("long")


def test_corpora_with_and_without_document_ids_form_one_batch(tmp_path: Path) -> None:
    with ShardWriter(
        tmp_path, "train", vocab_size=VOCABULARY, tokenizer_hash="0" * 64, eos_id=None
    ) as writer:
        for _ in range(50):
            writer.add(range(1, 6))
            writer.end_document()
    tokens = MixtureDataset(
        {"many": TokenDataset.open(tmp_path, "train"), "one": stream(1000)},
        [MixtureStage(weights={"many": 1, "one": 1})],
    )
    batch = build_sampler(tokens, 8, 0).batch(0, 20)
    assert batch.document_ids is not None
    assert batch.sources is not None
    sampler = build_sampler(tokens, 8, 0)
    assert all(
        sampler.batch(number, 1).document_ids is not None for number in range(8)
    )  # one form for every batch
    for row, name in enumerate(row_names(batch.sources)):
        assert (int(batch.document_ids[row].max()) > 0) == (name == "many")


@pytest.mark.parametrize(
    ("stages", "complaint"),
    [
        ([], "needs weights"),
        ([MixtureStage(weights={"c0": 1, "c1": 1})], "do not name c2; give a corpus 0"),
        (
            [MixtureStage(weights={"c0": 1, "c1": 1, "c2": 1, "x": 1})],
            "name x, but the mixture has c0, c1, c2",
        ),
        ([weights(1, 1, 1), weights(1, 1, 1)], r"every stage except the last needs `until`.*stage 1"),
        ([weights(1, 1, 1, until="5 steps")], "the last one must not have it"),
    ],
)
def test_stages_that_do_not_fit_are_refused(stages: list[MixtureStage], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        MixtureDataset(corpora(), stages)


def test_stages_that_do_not_follow_each_other_are_refused_with_their_samples() -> None:
    with pytest.raises(UsageError, match=r"50 = sample 200, 80 tokens = sample 10"):
        mixed(
            weights(1, 1, 1, until="50 steps"),
            weights(1, 1, 1, until="80 tokens"),
            weights(1, 1, 1),
            sequences_per_step=4,
        )


@pytest.mark.parametrize(
    ("said", "complaint"),
    [({"a": -1}, "0 or more"), ({"a": 0}, "all weights"), ({"a": float("inf")}, "finite|0 or more")],
)
def test_weights_that_are_all_0_or_invalid_are_refused(said: dict[str, float], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        MixtureStage(weights=said)


def test_corpora_of_different_tokenizers_are_refused() -> None:
    other = TokenDataset.from_ids(range(100), vocab_size=VOCABULARY, tokenizer_hash="1" * 64)
    with pytest.raises(DataError, match="different tokenizers"):
        MixtureDataset({"a": stream(0), "b": other}, [MixtureStage(weights={"a": 1, "b": 1})])


def test_as_a_stream_a_mixture_is_its_corpora_concatenated() -> None:
    members = corpora()
    tokens = MixtureDataset(members, [weights(1, 1, 1)])
    assert len(tokens) == sum(map(len, members.values()))
    assert tokens.read(0, len(tokens)).tolist() == [
        i for member in members.values() for i in member.read(0, len(member)).tolist()
    ]
    assert tokens.largest_id == max(member.largest_id for member in members.values())
    swapped = MixtureDataset(dict(reversed(members.items())), [weights(1, 1, 1)])
    assert tokens.fingerprint != swapped.fingerprint


def test_the_mixed_order_of_a_seed_is_pinned() -> None:
    """A change here breaks every resumed run, so it must be intended."""
    sampler = mixed(weights(1, 1.7, 3.1), seed=1337)
    assert "".join(map(str, sampler.locate(np.arange(24))[0].tolist())) == PINNED


PINNED = "212012212021221022120212"
