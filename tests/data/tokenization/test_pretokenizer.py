"""Text is split into words as by the tokenizers library, for every pattern and any text."""

from __future__ import annotations

import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from llm_trainer.data.tokenization.fast import pretokenizer as words_module
from llm_trainer.data.tokenization.fast.pretokenizer import (
    BERT_PATTERN,
    DEFAULT_PATTERN,
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    O200K_PATTERN,
    QWEN2_PATTERN,
    RegexPreTokenizer,
)

PATTERNS = [GPT2_PATTERN, DEFAULT_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN, O200K_PATTERN, BERT_PATTERN]
NAMES = ["gpt2", "ours", "llama3", "qwen2", "o200k", "bert"]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=NAMES)
AWKWARD = [
    "",
    " ",
    "Don't we'LL they'Ve 'S 'x ''s a's\r\n\r\n  x",
    "tabs\tand\x0b\x0c\x1c\x1d\x1e\x1f control\x85\xa0\u2028\u3000 space",
    "naïve café — “quotes” 日本語 Привет ǅungla ªº ²½ Ⅷ 〇 ٣ हिन्दी",
    "e\u0301 🙂👍🏽 \u200b\u180e \u017f'\u017f \u212a",
    "a/b//c\n/\r/ x/\n\n camelCase HTTPServer ÉCOLEs",
    "   trailing \n  \n   ",
    "1234567 3.14 x_1 __init__ #!?...",
]


def library(pattern: str, text: str) -> list[str]:
    cutter = (
        pre_tokenizers.BertPreTokenizer()
        if pattern == BERT_PATTERN
        else pre_tokenizers.Split(Regex(pattern), "isolated")
    )
    return [word for word, _ in cutter.pre_tokenize_str(text)]


def ours(pattern: str, text: str) -> list[str]:
    return [word for found in RegexPreTokenizer(pattern).split(text) for word in found]


@every_pattern
def test_difficult_texts_are_split_as_by_the_library(pattern: str) -> None:
    for text in AWKWARD:
        assert ours(pattern, text) == library(pattern, text)


@every_pattern
@settings(max_examples=150)
@given(
    text=st.text(
        alphabet=st.one_of(
            st.sampled_from("aAbt'sSlLmdrRveE  \n\r\t01./_#é日🙂"), st.characters(exclude_categories=["Cs"])
        ),
        max_size=60,
    )
)
def test_any_text_is_split_as_by_the_library(pattern: str, text: str) -> None:
    assert ours(pattern, text) == library(pattern, text)


@every_pattern
def test_a_long_text_is_split_in_blocks_at_word_boundaries(
    pattern: str, monkeypatch: pytest.MonkeyPatch, tiny_text: str
) -> None:
    text = tiny_text[:8000] + " " * 3000 + "a" * 3000 + "\n" * 3000 + tiny_text[:2000]
    monkeypatch.setattr(words_module, "_BLOCK", 64)
    blocks = list(RegexPreTokenizer(pattern).split(text))
    assert len(blocks) > 20
    assert [word for found in blocks for word in found] == library(pattern, text)


@every_pattern
def test_ordinary_text_in_many_scripts_is_split_without_the_library(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cutter = RegexPreTokenizer(pattern)
    monkeypatch.setattr(cutter, "_library", None)
    for text in (
        "def f(x):\n\treturn x\n",
        "naïve “text” — Größe, 日本語, Привет, 12345 🙂",
        "עברית العربية ไทย",
    ):
        assert [word for found in cutter.split(text) for word in found] == library(pattern, text)


@pytest.mark.slow
@every_pattern
def test_every_certain_character_has_the_same_class_in_both_engines(pattern: str) -> None:
    """Between letters of either case and between digits, the words show the class of a character."""
    _, uncertain = words_module._for_unicode(words_module._FOR_RE[pattern])
    points = [
        p
        for p in range(sys.maxunicode + 1)
        if unicodedata.category(chr(p)) != "Cs" and not uncertain.match(chr(p))
    ]
    assert len(points) > 45_000
    for start in range(0, len(points), 2000):
        text = "".join(
            f"x{chr(p)}x X{chr(p)}X 1{chr(p)}1 {chr(p)} .{chr(p)}.\n" for p in points[start : start + 2000]
        )
        assert ours(pattern, text) == library(pattern, text)
