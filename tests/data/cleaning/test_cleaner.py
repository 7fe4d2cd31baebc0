"""Cleaning: what normalization changes, that chunks give the same result, and that no document is lost."""

from __future__ import annotations

import itertools
import pickle
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_trainer.config.schema.data import DataConfig
from llm_trainer.data.cleaning.cleaner import NOTHING_LEFT_REASON, DocumentCleaner
from llm_trainer.data.cleaning.normalization import TextNormalizer
from llm_trainer.data.sources import base
from llm_trainer.data.sources.base import Rejected, SourceItem, TextChunk

ODD = (
    "\r\n\t \x00\x07\x0b\x0c\x1c\x1f\x7f\x85\xa0\xad\u0301\u200b\u200d\u2028\u202e\u3000\ufeffe\u00e9aA"
    "\U0001f468\u1100\u1161\ufb01.|"
)
odd_texts = st.one_of(st.text(st.sampled_from(ODD), max_size=60), st.text(max_size=60))
boilerplate = st.sampled_from(
    [
        "Skip to content",
        "We use cookies to serve you.",
        "page 3 of 10",
        "All rights reserved.",
        "Read more",
        "- 12 -",
    ]
)
line_texts = st.lists(st.one_of(odd_texts, boilerplate), max_size=12).map("\n".join)


def text_of(items: list[SourceItem]) -> list[str]:
    """The kept documents, with chunks concatenated, and the reason of each rejected one."""
    found, pending = [], ""
    for item in items:
        if isinstance(item, Rejected):
            found.append(item.reason)
            continue
        pending += item.text
        if item.is_last:
            found.append(pending)
            pending = ""
    return found


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("one\r\ntwo\rthree\u2028four\x85five\x0csix", "one\ntwo\nthree\nfour\nfive\nsix"),
        ("caf\u0065\u0301", "caf\u00e9"),
        ("no\u00a0break, thin\u2009space, wide\u3000space", "no break, thin space, wide space"),
        ("soft\u00adhy\u200bphen \ufeffmark\x07 bell\x1b[0m", "softhyphen mark bell[0m"),
        ("ends   \nwith spaces\t\n  ", "ends\nwith spaces"),
        ("one\n\n\n\n\n\ntwo", "one\n\n\ntwo"),
        ("\n \n\n    indented = True\n        deeper\n\n\n", "    indented = True\n        deeper"),
        ("a  |  table   |  stays", "a  |  table   |  stays"),
        (
            "\U0001f468\u200d\U0001f469 family, \u0915\u094d\u200d\u0937 joiner",
            "\U0001f468\u200d\U0001f469 family, \u0915\u094d\u200d\u0937 joiner",
        ),
    ],
)
def test_text_is_normalized(before: str, after: str) -> None:
    assert TextNormalizer().normalize(before) == after


def test_unicode_form_determines_ligatures_and_superscripts() -> None:
    text = "\ufb01ne x\u00b2 e\u0301"
    assert TextNormalizer("nfc").normalize(text) == "\ufb01ne x\u00b2 \u00e9"
    assert TextNormalizer("nfkc").normalize(text) == "fine x2 \u00e9"
    assert TextNormalizer("none").normalize(text) == text


def test_boilerplate_lines_are_removed_and_sentences_about_the_same_things_are_kept() -> None:
    page = "\n".join(
        [
            "Skip to main content",
            "This website uses cookies to improve your experience.",
            "Accept all cookies",
            "The recipe wants two cups of flour.",
            "SHARE ON FACEBOOK, TWITTER and Pinterest",
            "We use cookies in this chapter as an example of state that a server keeps in a browser; the "
            "protocol has none, and so every request brings along what the server wants to remember of those "
            "before it: a name, a value, a path and an age.",
            "She asked whether all rights reserved to the crown had lapsed.",
            "\u00a9 2019 Example Inc. All rights reserved.",
            "Sign up for our weekly newsletter!",
            "Log in | Sign up",
            "Page 3 of 10",
            "\u0130stanbul, page 4",
            "    - 12 -",
            "Read more",
        ]
    )
    kept = TextNormalizer().normalize(page).split("\n")
    assert [line.split()[0] for line in kept] == ["The", "We", "She", "\u0130stanbul,"]
    assert TextNormalizer(drop_boilerplate=False).normalize(page) == page


@pytest.mark.parametrize(
    "line",
    [
        "Our site uses cookies.", "We use third-party cookies to count you.",
        "By continuing to browse you accept our privacy policy.", "Reject all cookies",
        "Privacy Policy | Terms of Use · Contact", "Terms and Conditions",
        "(c) 2020 Someone. All Rights Reserved", "All rights reserved.", "Skip to navigation",
        "Jump to navigation, search", "Back to top", "Return to the top", "Toggle navigation",
        "Share this:", "Share this article on Facebook", "Follow us on Twitter", "Tweet this on X",
        "Subscribe to our newsletter", "Login | Register", "Click here to find out", "Show all",
        "Read more »", "Continue reading: the rest", "Please enable JavaScript to view this page.",
        "You need to enable JavaScript to run this app.", "JavaScript is disabled in your browser.",
        "Advertisement", "Related posts", "Leave a comment", "No comments", "12 comments", "1 like",
        "Page 7", "– 7 –", "Loading…",
    ],
)  # fmt: skip
def test_each_kind_of_boilerplate_is_removed_anywhere_in_a_text(line: str) -> None:
    assert TextNormalizer().normalize(f"before\n  {line}  \nafter") == "before\nafter"
    assert TextNormalizer().normalize(f"{line}\nkept\n{line.upper()}") == "kept"
    assert TextNormalizer().normalize(f"He said: {line}") == f"He said: {line}"


@settings(max_examples=300)
@given(line_texts)
def test_normalization_is_idempotent(text: str) -> None:
    for form in ("nfc", "nfkc", "none"):
        once = TextNormalizer(form).normalize(text)  # type: ignore[arg-type]
        assert TextNormalizer(form).normalize(once) == once  # type: ignore[arg-type]


@settings(max_examples=300)
@given(line_texts, st.lists(st.integers(0, 400), max_size=6))
def test_a_text_in_blocks_is_normalized_like_the_complete_text(text: str, cuts: list[int]) -> None:
    positions = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    chunks = [text[begin:end] for begin, end in itertools.pairwise(positions)]
    assert "".join(TextNormalizer().normalize_blocks(chunks)) == TextNormalizer().normalize(text)


@pytest.mark.parametrize("words", ["caf\u0065\u0301 ", "abc\u00ad", "\u65e5\u672c", "x. \t"])
def test_very_long_lines_in_blocks_are_normalized_like_the_complete_text(
    words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_trainer.data.cleaning.normalization._MAX_LINE_CHARACTERS", 100)
    text = "page 3\n" + words * 300 + "   \nRead more\n" + words * 70 + "\nlast"
    complete = "\n".join(
        [
            words.replace("e\u0301", "\u00e9").replace("\u00ad", "") * 300,
            words.replace("e\u0301", "\u00e9").replace("\u00ad", "") * 70,
        ]
    )
    expected = "\n".join(line.rstrip() for line in complete.split("\n")) + "\nlast"
    for size in (1, 7, 64, 1000, len(text)):
        chunks = [text[begin : begin + size] for begin in range(0, len(text), size)]
        assert "".join(TextNormalizer().normalize_blocks(chunks)) == expected


def test_without_settings_nothing_is_changed() -> None:
    cleaning = DocumentCleaner.from_config(DataConfig())
    items: list[SourceItem] = [
        TextChunk("x \r\n", False),
        TextChunk(" y"),
        Rejected("empty", "f"),
        TextChunk("\x07", split="test"),
    ]
    assert cleaning.is_identity
    assert cleaning.key is None
    assert list(cleaning.apply(iter(items))) == items


@settings(max_examples=100)
@given(st.lists(st.one_of(st.lists(odd_texts, min_size=1, max_size=4), st.none()), max_size=6))
def test_every_document_is_kept_or_rejected_whatever_its_contents(corpus: list[list[str] | None]) -> None:
    items: list[SourceItem] = []
    for chunks in corpus:
        if chunks is None:
            items.append(Rejected("empty", "somewhere"))
        else:
            items += [TextChunk(text, index == len(chunks) - 1) for index, text in enumerate(chunks)]
    cleaning = DocumentCleaner.from_config(
        DataConfig(clean=True, filters=["length", "symbols", "repetition"], min_characters=5)
    )
    filtered, unfiltered = (
        text_of(list(cleaning.apply(iter(items)))),
        text_of(list(cleaning.apply(iter(items), apply_filters=False))),
    )
    assert len(filtered) == len(unfiltered) == len(corpus)


def test_rejected_documents_have_a_reason_a_position_and_their_text() -> None:
    cleaning = DocumentCleaner.from_config(DataConfig(clean=True, filters="length", min_characters=10))
    items: list[SourceItem] = [
        Rejected("not utf-8", "a.txt, byte 3"),
        TextChunk("too\u00a0short"),
        TextChunk("long enough\u00a0now"),
        TextChunk(" \u200b\n"),
    ]
    found = list(cleaning.apply(iter(items), where="b.txt, "))
    assert found == [
        Rejected("not utf-8", "a.txt, byte 3"),
        Rejected("shorter than 10 characters", "b.txt, document 2", "too short"),
        TextChunk("long enough now"),
        Rejected(NOTHING_LEFT_REASON, "b.txt, document 4", " \u200b\n"),
    ]


def test_without_filtering_the_kept_documents_are_the_same() -> None:
    vocabulary = ["to", "be", "or", "not", "that", "is", "the", "question"]
    words = [" ".join(random.Random(seed).choices(vocabulary, k=seed)) for seed in range(1, 60)]
    cleaning = DocumentCleaner.from_config(
        DataConfig(clean=True, filters=["length", "repetition"], max_repeated_fraction=0.2)
    )
    filtered = list(cleaning.apply(TextChunk(text) for text in words))
    unfiltered = list(cleaning.apply((TextChunk(text) for text in words), apply_filters=False))
    kept = [index for index, item in enumerate(filtered) if isinstance(item, TextChunk)]
    assert 0 < len(kept) < len(words)
    assert [filtered[index] for index in kept] == [unfiltered[index] for index in kept]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(base, "CHUNK_BYTES", 1000)
    return 1000


def chunks_of(text: str, split: str | None = None) -> list[SourceItem]:
    return list(base.rechunk(iter([text]), split))


def test_a_long_document_is_cleaned_in_chunks_to_the_same_text(small_chunks: int) -> None:
    text = "\r\n".join(f"line {number} of caf\u0065\u0301s,\u00a0many   " for number in range(300))
    cleaning = DocumentCleaner.from_config(DataConfig(clean=True))
    items = list(
        cleaning.apply(iter([TextChunk("before it"), *chunks_of(text, "test"), TextChunk("after it")]))
    )
    assert text_of(items) == ["before it", TextNormalizer().normalize(text), "after it"]
    inner = items[1:-1]
    assert len(inner) > 5
    assert all(
        isinstance(chunk, TextChunk) and chunk.split == "test" and len(chunk.text) <= small_chunks
        for chunk in inner
    )


def test_a_long_document_is_rejected_completely_by_its_first_chunk(small_chunks: int) -> None:
    good = " ".join(f"word{number}" for number in range(1500))
    bad = "!?# " * 1500
    cleaning = DocumentCleaner.from_config(DataConfig(filters="symbols"))
    items = [*chunks_of(good + bad), *chunks_of(bad + good), TextChunk("after it")]
    found = list(cleaning.apply(iter(items)))
    assert text_of(found) == [good + bad, "too many symbols", "after it"]
    rejected = next(item for item in found if isinstance(item, Rejected))
    assert rejected.where == "document 2"
    assert rejected.text is not None
    assert (bad + good).startswith(rejected.text)
    assert text_of(list(cleaning.apply(iter(items), apply_filters=False))) == [
        good + bad,
        bad + good,
        "after it",
    ]


def test_a_cleaner_is_picklable_and_its_key_distinguishes_settings() -> None:
    config = {"clean": True, "filters": ["length", "symbols"]}
    cleaning = DocumentCleaner.from_config(DataConfig(**config))
    assert pickle.loads(pickle.dumps(cleaning)) == cleaning
    others: list[dict[str, object]] = [
        {"min_characters": 7},
        {"unicode_form": "nfkc"},
        {"drop_boilerplate": False},
        {"filters": ["length"]},
    ]
    keys = [str(DocumentCleaner.from_config(DataConfig(**{**config, **other})).key) for other in others]
    assert len({str(cleaning.key), *keys}) == 5
    assert str(
        DocumentCleaner.from_config(DataConfig(**config, num_workers=3, max_symbol_fraction=0.4)).key
    ) == str(cleaning.key)
