"""Augmentation is seeded per sample, keeps words intact, and supervises only what can be predicted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm_trainer.config import DataConfig
from llm_trainer.data.sampling.augmentation import Augmentation, AugmentedSampler, with_augmentation
from llm_trainer.data.sampling.batch import IGNORE_INDEX, Batch
from llm_trainer.data.sampling.packing import STRATEGIES, Packing, Strategy
from llm_trainer.data.sampling.samplers import build_sampler
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.errors import UsageError

CONTEXT = 64


@pytest.fixture(scope="module")
def stream(
    tiny_texts: list[str], tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> TokenDataset:
    from llm_trainer.data.token_shards import ShardWriter

    folder = tmp_path_factory.mktemp("noise")
    facts = {"vocab_size": tiny_tokenizer.vocab_size, "tokenizer_hash": tiny_tokenizer.hash}
    with ShardWriter(folder, "train", eos_id=tiny_tokenizer.eos_id, **facts) as writer:
        for text in tiny_texts:
            writer.add(tiny_tokenizer.encode(text[:300]))
            writer.end_document()
    return TokenDataset.open(folder, "train")


def text_of(batch: Batch, row: int, tokenizer: Tokenizer) -> str:
    """The text of the row's labels."""
    return tokenizer.decode([label for label in batch.labels[row].tolist() if label != IGNORE_INDEX])


def test_without_augmentation_the_sampler_is_unchanged(
    stream: TokenDataset, tiny_tokenizer: Tokenizer
) -> None:
    sampler = build_sampler(stream, CONTEXT, 0)
    assert with_augmentation(sampler, Augmentation.from_config(DataConfig()), tiny_tokenizer, 0) is sampler
    idle = AugmentedSampler(sampler, Augmentation(), tiny_tokenizer, 0)
    for name in ("input_ids", "labels", "document_ids"):
        assert torch.equal(getattr(idle.batch(3, 20), name), getattr(sampler.batch(3, 20), name))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_augmentation_is_a_function_of_the_seed_and_the_sample(
    stream: TokenDataset, tiny_tokenizer: Tokenizer, strategy: Strategy
) -> None:
    noise = Augmentation(span_drop=0.1, case=0.2, whitespace=0.2)

    def noised(seed: int) -> AugmentedSampler:
        return AugmentedSampler(
            build_sampler(stream, CONTEXT, 0, Packing(strategy)), noise, tiny_tokenizer, seed
        )

    whole, fresh = noised(1).batch(0, 30), noised(1)
    for first in (29, 7, 0):
        part = fresh.batch(first, 1)
        assert torch.equal(part.input_ids[0], whole.input_ids[first])
        assert torch.equal(part.labels[0], whole.labels[first])
    assert not torch.equal(noised(2).batch(0, 30).labels, whole.labels)
    size = fresh.samples_per_epoch
    rows = [noised(1).batch(number, 1).labels for number in range(3 * size)]
    assert len({tuple(row.flatten().tolist()) for row in rows}) > 2.5 * size  # another pass sees other noise


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_case_and_whitespace_change_no_word(
    stream: TokenDataset, tiny_tokenizer: Tokenizer, strategy: Strategy
) -> None:
    plain = build_sampler(stream, CONTEXT, 0, Packing(strategy))
    noisy = AugmentedSampler(plain, Augmentation(case=0.5, whitespace=0.5), tiny_tokenizer, 0)
    before, after = plain.batch(0, 40), noisy.batch(0, 40)
    changed = 0
    for row in range(40):
        # A row that grew was cut, so the noised text is a beginning of the plain one, word by word.
        words, noised = (text_of(batch, row, tiny_tokenizer).casefold().split() for batch in (before, after))
        assert noised[:-1] == words[: len(noised) - 1]
        changed += text_of(before, row, tiny_tokenizer) != text_of(after, row, tiny_tokenizer)
    assert changed > 30


def test_inputs_and_labels_stay_consistent(stream: TokenDataset, tiny_tokenizer: Tokenizer) -> None:
    noise = Augmentation(span_drop=0.2, span_length=3, case=0.3, whitespace=0.3)
    batch = AugmentedSampler(
        build_sampler(stream, CONTEXT, 0, Packing("first_fit")), noise, tiny_tokenizer, 0
    ).batch(0, 40)
    assert batch.document_ids is not None
    same = (batch.document_ids[:, 1:] == batch.document_ids[:, :-1]) & (batch.labels[:, :-1] != IGNORE_INDEX)
    assert torch.equal(batch.labels[:, :-1][same], batch.input_ids[:, 1:][same])
    assert batch.num_supervised == int((batch.labels != IGNORE_INDEX).sum())
    opened = batch.input_ids[:, 0] == tiny_tokenizer.eos_id
    assert opened.sum() > 10  # what opens a document is never dropped


def test_the_requested_fraction_is_dropped_in_spans_and_not_predicted_across() -> None:
    ids = TokenDataset.from_ids(np.arange(1, 20_000) % 250, vocab_size=256)
    tokenizer = Tokenizer.from_alphabet([chr(0x4E00 + n) for n in range(256)])
    plain = build_sampler(ids, 100, 0)
    noisy = AugmentedSampler(plain, Augmentation(span_drop=0.3, span_length=5), tokenizer, 0).batch(0, 150)
    kept = sum(int((row != IGNORE_INDEX).nonzero().max()) + 1 for row in noisy.labels)
    assert kept / (150 * 100) == pytest.approx(0.7, abs=0.02)
    supervised = noisy.labels != IGNORE_INDEX
    assert bool(
        ((noisy.labels - noisy.input_ids) % 250 == 1)[supervised].all()
    )  # what is learned always follows from what is seen
    spans = 0.3 / 0.7 * kept / 5
    assert int((~supervised[:, :-1] & supervised[:, 1:]).sum()) == pytest.approx(
        spans, rel=0.3
    )  # spans that touch are one


def test_changes_that_a_character_tokenizer_cannot_encode_are_skipped() -> None:
    tokenizer = Tokenizer.from_characters(["abc "])
    ids = TokenDataset.from_ids(tokenizer.encode("abc " * 100), vocab_size=tokenizer.vocab_size)
    noisy = AugmentedSampler(
        build_sampler(ids, 16, 0), Augmentation(case=1.0, whitespace=1.0), tokenizer, 0
    ).batch(0, 10)
    texts = [text_of(noisy, row, tokenizer) for row in range(10)]
    assert all(set(text) <= set("abc ") for text in texts)
    assert any("  " in text for text in texts)


def test_augmentation_without_a_tokenizer_is_refused(stream: TokenDataset) -> None:
    with pytest.raises(UsageError, match="needs a tokenizer"):
        with_augmentation(build_sampler(stream, CONTEXT, 0), Augmentation(case=0.1), None, 0)
