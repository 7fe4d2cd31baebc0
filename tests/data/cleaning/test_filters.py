"""Built-in filters: what they reject and keep, and that their fast paths agree with plain counting."""

from __future__ import annotations

import inspect
import json
import textwrap
from pydoc_data.topics import topics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_trainer.config.schema.data import DataConfig
from llm_trainer.data.cleaning.cleaner import build_filter
from llm_trainer.data.cleaning.filters import repeated_line_fraction, repeated_ngram_fraction, symbol_fraction

PROSE = topics["objects"] if "objects" in topics else max(topics.values(), key=len)
CODE = inspect.getsource(textwrap)


def reason(name: str, text: str, **settings: object) -> str | None:
    found = build_filter(name, DataConfig(**settings)).apply(text)
    assert found.text == text
    return found.reason


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        CODE,
        json.dumps({"question": "What is it?", "answers": ["words and words", "more words"]}, indent=2),
    ],
    ids=["prose", "code", "json"],
)
def test_ordinary_texts_pass_the_built_in_filters(text: str) -> None:
    assert [reason(name, text) for name in ("length", "symbols", "repetition")] == [None, None, None]


def test_length_counts_characters_without_whitespace_at_the_ends() -> None:
    assert reason("length", "  12345  ", min_characters=5) is None
    assert reason("length", "  12345  ", min_characters=6) == "shorter than 6 characters"
    assert reason("length", "123456", min_characters=0, max_characters=5) == "longer than 5 characters"


def test_symbols_rejects_texts_of_mostly_symbols() -> None:
    assert reason("symbols", "+----+----+\n| ab | cd |\n+====+====+") == "too many symbols"
    assert reason("symbols", "\u2592\u2592\u2591\u2591 \u2605\u2605\u2605 ok") == "too many symbols"
    assert reason("symbols", "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3002") is None


def test_marks_that_are_vowels_are_not_symbols() -> None:
    assert symbol_fraction("सभी मनुष्यों को गौरव") == 0
    assert symbol_fraction("มนุษย์ทั้งหลาย") == 0
    assert symbol_fraction("a b，c。") == 0.4


def test_repetition_rejects_repeated_lines_and_words() -> None:
    assert reason("repetition", "buy now and save\n" * 10) == "repeated lines"
    assert reason("repetition", "buy now and save " * 30) == "repeated words"
    assert reason("repetition", "la la la la la la") is None, "too short to judge"
    assert reason("repetition", "one line\nanother line\n" + PROSE) is None


@given(st.text(st.characters(max_codepoint=127)))
def test_symbols_are_counted_the_same_with_and_without_other_characters_than_ascii(text: str) -> None:
    visible = [character for character in text if not character.isspace()]
    symbols = [character for character in visible if not character.isalnum()]
    assert symbol_fraction(text) == pytest.approx(len(symbols) / len(visible) if visible else 0)
    assert symbol_fraction(text + "\u00e9") == pytest.approx(len(symbols) / (len(visible) + 1))


@given(st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=60))
def test_fractions_of_repetition_agree_with_plain_counting(words: list[str]) -> None:
    ngrams = [tuple(words[start : start + 5]) for start in range(len(words) - 4)]
    expected = 1 - len(set(ngrams)) / len(ngrams) if len(ngrams) >= 20 else 0
    assert repeated_ngram_fraction(" ".join(words)) == pytest.approx(expected)
    lines = ["".join(words[start : start + 2]) for start in range(0, len(words), 2)]
    total = sum(map(len, lines))
    assert repeated_line_fraction("\n".join(lines)) == pytest.approx(
        1 - sum(map(len, set(lines))) / total if total else 0
    )
