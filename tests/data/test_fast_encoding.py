"""The fast way to encode gives the library's ids, or steps aside."""

from __future__ import annotations

import json
import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from llm_trainer.data import fast_encoding
from llm_trainer.data.builtin import language_reference
from llm_trainer.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_bpe([text for _, text in language_reference()][:30], 1000)


def slow(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer._backend.encode(text, add_special_tokens=False).ids


def fast(tokenizer: Tokenizer, text: str) -> list[int] | None:
    assert tokenizer._fast is not None
    ids = tokenizer._fast.encode(text)
    return None if ids is None else ids.tolist()


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet=st.one_of(st.sampled_from("aAbt'sSlL  \n\r\t01.,é日🙂"), st.characters(exclude_categories=["Cs"])), max_size=80)
)
def test_fast_ids_are_the_librarys_ids(tokenizer: Tokenizer, text: str) -> None:
    assert fast(tokenizer, text) in (None, slow(tokenizer, text))


def test_ordinary_text_goes_the_fast_way(tokenizer: Tokenizer) -> None:
    for text in ("def f(x):\n\treturn x  # don't\n\n", "naïve “text” — Größe, 日本語, Привет, 12345 🙂", "<|endoftext|>", ""):
        assert fast(tokenizer, text) == slow(tokenizer, text)


def test_the_whole_language_reference_agrees(tokenizer: Tokenizer) -> None:
    for _, text in language_reference():
        assert fast(tokenizer, text) == slow(tokenizer, text)


@pytest.mark.parametrize("text", [" " * 50_000, "a" * 50_000, "\n" * 50_000, "ab " + chr(0x1FAFF) + chr(0x10FFFF)])
def test_what_is_not_certain_is_left_to_the_library(tokenizer: Tokenizer, text: str) -> None:
    assert fast(tokenizer, text) is None
    assert tokenizer.encode(text) == slow(tokenizer, text)


def test_gpt2s_words_have_a_fast_way_too(tokenizer: Tokenizer) -> None:
    backend = tokenizer._backend.from_str(tokenizer.to_json())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    other = Tokenizer(backend, {})
    for _, text in language_reference()[:10]:
        assert fast(other, text) == slow(other, text)


def test_words_cut_in_an_unknown_way_have_no_fast_way(tokenizer: Tokenizer) -> None:
    backend = tokenizer._backend.from_str(tokenizer.to_json())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\w+"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    other = Tokenizer(backend, {})
    assert other._fast is None
    assert other.decode(other.encode("still right")) == "still right"


def test_merges_that_tiktoken_would_read_differently_are_refused(tokenizer: Tokenizer) -> None:
    """With merges ab, then cd, then a+bcd made possible by bc: joined bytes alone would find a pair that the list does not have."""
    parts = json.loads(tokenizer.to_json())
    byte_level = {token: i for token, i in parts["model"]["vocab"].items() if len(token) == 1}
    last = max(byte_level.values())
    merges = [["b", "c"], ["a", "b"], ["a", "bc"]]
    vocabulary = {**byte_level, "bc": last + 1, "ab": last + 2, "abc": last + 3}
    parts["model"].update(vocab=vocabulary, merges=merges)
    assert fast_encoding._prove(parts) is not None
    parts["model"].update(merges=[["b", "c"], ["a", "b"], ["ab", "c"]])  # "abc" alone becomes a + bc, never ab + c
    assert fast_encoding._prove(parts) is None
    parts["model"].update(vocab=vocabulary, merges=[["a", "b"], ["b", "c"], ["a", "bc"]])  # not in the order of the ids
    assert fast_encoding._prove(parts) is None


@pytest.mark.slow
def test_every_character_that_counts_as_certain_has_one_class_in_both_libraries(tokenizer: Tokenizer) -> None:
    """Between two letters and two digits, a character's class shows in how the words are cut."""
    uncertain = fast_encoding._uncertain_characters(fast_encoding._ALL)
    points = [p for p in range(sys.maxunicode + 1) if unicodedata.category(chr(p)) != "Cs" and not uncertain.match(chr(p))]
    assert len(points) > 200_000
    for start in range(0, len(points), 5000):
        text = "".join(f"x{chr(p)}x 1{chr(p)}1 {chr(p)} \n" for p in points[start : start + 5000])
        assert fast(tokenizer, text) == slow(tokenizer, text)
