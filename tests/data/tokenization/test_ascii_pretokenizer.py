"""The word starts that numpy finds in ASCII text are those of the regular expressions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_trainer.data.tokenization.fast.ascii_pretokenizer import RULES, SEPARATOR, word_starts
from llm_trainer.data.tokenization.fast.pretokenizer import RegexPreTokenizer

SOME_OF_EACH_CLASS = "aAst'' \n\r\t\x0b\x1c12.,_lLreVE"
TEXTS = st.lists(st.text(alphabet=st.sampled_from(SOME_OF_EACH_CLASS), max_size=16), min_size=1, max_size=40)
ANY_ASCII = st.lists(
    st.text(alphabet=st.characters(max_codepoint=0x7F), max_size=40), min_size=1, max_size=10
)


def cut(pattern: str, texts: list[str]) -> list[list[str]]:
    raw = bytes([SEPARATOR]).join([b"", *(text.encode() for text in texts), b""])
    places = np.flatnonzero(word_starts(raw, RULES[pattern])).tolist()
    found: list[list[str]] = []
    for start, end in zip(places, [*places[1:], len(raw)], strict=True):
        if raw[start] == SEPARATOR:
            assert end == start + 1, "a separator is a word of its own"
            found.append([])
        else:
            found[-1].append(raw[start:end].decode())
    return found[:-1]


@pytest.mark.parametrize("pattern", RULES, ids=["ours", "llama3", "qwen2", "gpt2"])
@settings(max_examples=400)
@given(texts=st.one_of(TEXTS, ANY_ASCII))
def test_words_begin_where_the_regular_expression_splits(pattern: str, texts: list[str]) -> None:
    words = RegexPreTokenizer(pattern)
    assert cut(pattern, texts) == [[word for some in words.split(text) for word in some] for text in texts]
