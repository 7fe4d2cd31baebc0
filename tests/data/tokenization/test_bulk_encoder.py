"""The bulk encoder gives the library's ids, or leaves the text to the library."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from llm_trainer.data.sources.builtin_corpus import language_reference
from llm_trainer.data.tokenization.fast import bulk_encoder, word_cache
from llm_trainer.data.tokenization.fast.pretokenizer import LLAMA3_PATTERN, O200K_PATTERN, QWEN2_PATTERN
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.data.tokenization.tokenizer_json import byte_level_pre_tokenizer

TEXTS = [text for _, text in language_reference()][:30]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train("bpe", TEXTS, 1000)


def changed(tokenizer: Tokenizer, change: Callable[[Backend], object]) -> Tokenizer:
    """The same merges in a changed tokenizer."""
    backend = Backend.from_str(tokenizer.to_json())
    change(backend)
    return Tokenizer(backend, {})


def with_added_tokens(pattern: str) -> Callable[[Backend], None]:
    return lambda backend: setattr(backend, "pre_tokenizer", byte_level_pre_tokenizer(pattern))


def slow(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer._backend.encode(text, add_special_tokens=False).ids


def fast(tokenizer: Tokenizer, text: str) -> list[int] | None:
    assert tokenizer._bulk_encoder is not None
    (ids,) = tokenizer._bulk_encoder.encode([text])
    return None if ids is None else ids.tolist()


@pytest.fixture(scope="module", params=["ours", "gpt2", "llama3", "qwen2", "o200k", "wordpiece"])
def kind(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Tokenizer:
    if request.param == "wordpiece":
        return Tokenizer.train("wordpiece", TEXTS, 1000)
    gpt2 = lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False))  # noqa: E731
    patterns = {"llama3": LLAMA3_PATTERN, "o200k": O200K_PATTERN}
    if request.param == "qwen2":
        return changed(
            changed(tokenizer, with_added_tokens(QWEN2_PATTERN)),
            lambda backend: setattr(backend, "normalizer", normalizers.NFC()),
        )
    return (
        tokenizer
        if request.param == "ours"
        else changed(
            tokenizer, gpt2 if request.param == "gpt2" else with_added_tokens(patterns[request.param])
        )
    )


@settings(max_examples=150)
@given(
    text=st.text(
        alphabet=st.one_of(
            st.sampled_from("aAbt'sSlL  \n\r\t01.,é日🙂"), st.characters(exclude_categories=["Cs"])
        ),
        max_size=80,
    )
)
def test_fast_ids_are_the_librarys_ids(kind: Tokenizer, text: str) -> None:
    assert fast(kind, text) in (None, slow(kind, text))
    assert kind._bulk_encoder is not None
    assert kind._bulk_encoder.matches_library


def test_the_ids_of_the_python_language_reference_are_the_librarys(kind: Tokenizer) -> None:
    for _, text in language_reference():
        assert fast(kind, text) == slow(kind, text)


@settings(max_examples=50)
@given(
    texts=st.lists(
        st.text(
            alphabet=st.one_of(
                st.sampled_from("abc'sS  \n1.,é’日"), st.characters(exclude_categories=["Cs"])
            ),
            max_size=30,
        )
    )
)
def test_texts_in_a_batch_have_the_ids_that_they_have_alone(kind: Tokenizer, texts: list[str]) -> None:
    assert kind._bulk_encoder is not None
    found = kind._bulk_encoder.encode(texts)
    assert [None if ids is None else ids.tolist() for ids in found] == [fast(kind, text) for text in texts]


def test_words_whose_slots_are_taken_are_encoded_correctly(
    kind: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(word_cache, "_SLOT_BITS", 2)
    monkeypatch.setattr(word_cache, "_DROPPED", np.uint64(62))
    crowded = Tokenizer(Backend.from_str(kind.to_json()), {})
    for _ in range(2):  # learned, then found
        for text in TEXTS[:3]:
            assert fast(crowded, text) == slow(crowded, text)


@pytest.mark.parametrize(
    "text",
    [" " * 50_000, "a" * 50_000, "\n" * 50_000, "ab " + chr(0x1FAFF) + chr(0x10FFFF), "<|endoftext|>", ""],
)
def test_extreme_texts_have_the_librarys_ids(kind: Tokenizer, text: str) -> None:
    assert fast(kind, text) == slow(kind, text)


def test_text_that_is_not_nfc_is_left_to_the_library(tokenizer: Tokenizer) -> None:
    composing = changed(tokenizer, lambda backend: setattr(backend, "normalizer", normalizers.NFC()))
    assert fast(composing, "cafe\u0301") is None
    assert composing.encode("cafe\u0301") == composing.encode("café") == fast(composing, "café")


def test_a_full_cache_is_cleared_and_the_ids_stay_correct(
    kind: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_encoder, "MAX_CACHED_WORDS", 10)
    monkeypatch.setattr(word_cache, "MAX_CACHED_WORDS", 10)
    again = Tokenizer(Backend.from_str(kind.to_json()), {})
    for text in TEXTS[:3]:
        assert fast(again, text) == slow(again, text)
    assert again._bulk_encoder is not None
    assert len(again._bulk_encoder._known_words) <= 10
    assert len(again._bulk_encoder._word_cache) <= 10


def unknown_words(backend: Backend) -> None:
    cut = pre_tokenizers.Split(Regex(r"\w+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def plain_added_token(backend: Backend) -> None:
    backend.add_tokens([AddedToken("    ", normalized=False)])


def other_normalizer(backend: Backend) -> None:
    backend.normalizer = normalizers.Lowercase()


def space_before(backend: Backend) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


@pytest.mark.parametrize("change", [unknown_words, plain_added_token, other_normalizer, space_before])
def test_unknown_tokenizers_have_no_bulk_encoder(
    tokenizer: Tokenizer, change: Callable[[Backend], None]
) -> None:
    other = changed(tokenizer, change)
    assert other._bulk_encoder is None
    text = "Still    right, 12345 of it"
    assert other.encode(text) == slow(other, text)


def test_bpe_dropout_has_no_bulk_encoder(tokenizer: Tokenizer) -> None:
    parts = json.loads(tokenizer.to_json())
    parts["model"]["dropout"] = 0.5
    assert Tokenizer(Backend.from_str(json.dumps(parts)), {})._bulk_encoder is None


def test_if_one_id_differs_the_library_encodes_everything(tokenizer: Tokenizer) -> None:
    """A wrong entry in the cache is noticed in the first text, and no wrong id is returned."""
    faulty = Tokenizer(Backend.from_str(tokenizer.to_json()), {})
    assert faulty._bulk_encoder is not None
    faulty._bulk_encoder._word_cache._known[b" the"] = (0, 1)
    assert faulty.encode("over the moon") == slow(tokenizer, "over the moon")
    assert not faulty._bulk_encoder.matches_library
    assert faulty.encode("under the sun") == slow(tokenizer, "under the sun")
