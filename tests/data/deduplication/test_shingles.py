"""Hashed word n-grams: equal exactly if a plain implementation of the rule finds them equal."""

from __future__ import annotations

import itertools
import re

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_trainer.data.deduplication import shingles
from llm_trainer.data.deduplication.shingles import StreamingShingler, shingle_hashes

WORD = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u30a0-\ud7ff\u3040-\u309f\U00010000-\U0010ffff]"
    r"|[a-z0-9_\u00c0-\u0dff\u0400-\u04ff]+"
)
texts = st.lists(
    st.sampled_from(
        [
            "a",
            "b",
            "cat",
            "The",
            "it's",
            "x_1",
            "\u00e9t\u00e9",
            "\u201cquoted\u201d",
            "\u65e5\u672c",
            "\u3002",
            "\U0001f600",
            "-",
            "\u00a0",
            "\u0e01\u0e32",
            "\u0434\u0430",
        ]
    ),
    max_size=14,
).map(" ".join)


def plain_ngrams(text: str, words: int) -> list[tuple[str, ...]]:
    """The word n-grams, as tuples of strings."""
    found = tuple(WORD.findall(text.lower()))
    if not found:
        return [("no words", text.lower())]
    return [found[start : start + words] for start in range(max(1, len(found) - words + 1))]


def chunked_hashes(text: str, cuts: list[int], words: int) -> list[int]:
    """The hashes of a text that is divided anywhere, through `StreamingShingler`."""
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    shingler = StreamingShingler(words)
    found = [hashes for begin, end in itertools.pairwise(bounds) for hashes in shingler.add(text[begin:end])]
    return np.concatenate([*found, *shingler.end()]).tolist()


@settings(max_examples=300)
@given(st.lists(texts, min_size=1, max_size=6), st.integers(1, 6))
@example(["", "a b c d e", "!!!", "\u65e5\u672c\u8a9e\u306e\u30c6"], 5)
def test_hashes_are_equal_exactly_if_the_ngrams_are(corpus: list[str], words: int) -> None:
    hashes, offsets = shingle_hashes(corpus, words)
    plain = [plain_ngrams(text, words) for text in corpus]
    assert np.diff(offsets).tolist() == [len(ngrams) for ngrams in plain]
    pairs = set(zip(itertools.chain.from_iterable(plain), hashes.tolist(), strict=True))
    assert len(pairs) == len({ngram for ngram, _ in pairs}) == len({one for _, one in pairs})


@settings(max_examples=300)
@given(texts, st.lists(st.integers(0, 40), max_size=4), st.integers(1, 6))
def test_a_text_in_chunks_has_the_hashes_of_the_complete_text(text: str, cuts: list[int], words: int) -> None:
    assert chunked_hashes(text, cuts, words) == shingle_hashes([text], words)[0].tolist()


def test_long_texts_hashed_in_blocks_have_the_same_hashes() -> None:
    text = " ".join(f"word{number % 977}" for number in range(60000))
    assert len(text) > shingles.BLOCK_BYTES
    shingler = StreamingShingler(5)
    assert (
        np.concatenate([*shingler.add(text), *shingler.end()]).tolist()
        == shingle_hashes([text], 5)[0].tolist()
    )


def test_hashes_do_not_depend_on_the_process_or_the_machine() -> None:
    assert shingle_hashes(["the quick brown fox jumps"], 5)[0].tolist() == [5026100253501346379]
