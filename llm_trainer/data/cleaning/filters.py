"""Filters that judge whole documents by name: three built-in ones here, datatrove's and the language's in
modules of their own.

A filter looks at a text and says why it refuses it, in a few fixed words that can be counted, or None. The
built-in rules are simple ones in the spirit of Gopher (Rae et al. 2021, arXiv:2112.11446, appendix A.1),
meant for any kind of text, code included, in any language; the published sets are for English web pages, and
are to be had from datatrove, whose implementation made FineWeb.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass
from typing import NamedTuple, Protocol

import numpy as np
from pydantic import JsonValue

from llm_trainer.config.schema.data import DataConfig
from llm_trainer.data.deduplication.shingles import StreamingShingler

_NO_SIGNS = bytes(byte for byte in range(256) if byte >= 0x80 or chr(byte).isalnum() or chr(byte).isspace())
_NOT_VISIBLE = bytes(byte for byte in range(256) if byte >= 0x80 or chr(byte).isspace())
_ASCII = re.compile("[\x00-\x7f]+")
_RUN = 5  # words
_ENOUGH_RUNS = 20  # to speak of a share of repeated ones


class FilterResult(NamedTuple):
    """Why a text is refused (None: it is kept), and the text, which a filter may have changed."""

    reason: str | None
    text: str


class Filter(Protocol):
    """Judges whole documents."""

    @property
    def changes_text(self) -> bool:
        """Whether a kept text may come back changed; such a filter also runs where verdicts are already
        known.
        """

    @property
    def key(self) -> JsonValue:
        """Everything that decides its verdicts."""

    def apply(self, text: str) -> FilterResult:
        """Its verdict."""


@dataclass(frozen=True)
class LengthFilter:
    """Refuses documents of too few or too many characters, blanks at the ends not counted."""

    min_characters: int
    max_characters: int
    changes_text = False

    @property
    def key(self) -> JsonValue:
        """The bounds."""
        return {"length": asdict(self)}

    def apply(self, text: str) -> FilterResult:
        """By number of characters."""
        length = len(text.strip())
        if length < self.min_characters:
            return FilterResult(f"shorter than {self.min_characters} characters", text)
        return FilterResult(
            f"longer than {self.max_characters} characters" if length > self.max_characters else None, text
        )


@dataclass(frozen=True)
class SymbolFilter:
    """Refuses documents in which signs (neither letters, digits nor blanks) are too large a share of all
    characters but blanks.

    Shakespeare's plays have 0.06 of them, files of Python's standard library 0.16 (median; 99 % are under
    0.32), tables in ASCII art, operators and markup 0.5 and more.
    """

    max_symbol_fraction: float
    changes_text = False

    @property
    def key(self) -> JsonValue:
        """The bound."""
        return {"symbols": asdict(self)}

    def apply(self, text: str) -> FilterResult:
        """By share of signs."""
        return FilterResult(
            "too many symbols" if symbol_fraction(text) > self.max_symbol_fraction else None, text
        )


@dataclass(frozen=True)
class RepetitionFilter:
    """Refuses documents that say the same over and over.

    Two shares are taken: of characters that stand in lines which were there before, and of runs of 5 words
    that were there before. Of the files of Python's standard library 99 % are under 0.25 in both, and none is
    over 0.44.
    """

    max_repeated_fraction: float
    changes_text = False

    @property
    def key(self) -> JsonValue:
        """The bound."""
        return {"repetition": asdict(self)}

    def apply(self, text: str) -> FilterResult:
        """By repeated lines, then by repeated runs of words."""
        if repeated_line_fraction(text) > self.max_repeated_fraction:
            return FilterResult("repeated lines", text)
        return FilterResult(
            "repeated words" if repeated_ngram_fraction(text) > self.max_repeated_fraction else None, text
        )


def symbol_fraction(text: str) -> float:
    """Characters that are neither letters, digits nor blanks, over all that are not blanks; 0 without any."""
    raw = text.encode("utf-8")
    signs, visible = len(raw.translate(None, _NO_SIGNS)), len(raw.translate(None, _NOT_VISIBLE))
    if not text.isascii():
        for character, count in Counter(_ASCII.sub("", text)).items():
            kind = unicodedata.category(character)[
                0
            ]  # letter, mark (the vowels of Indic scripts), number; punctuation, symbol, other; space
            visible += 0 if character.isspace() else count
            signs += count if kind in "PSC" and not character.isspace() else 0
    return signs / visible if visible else 0.0


def repeated_line_fraction(text: str) -> float:
    """Characters of lines (blanks at their ends aside) that stood in the text before, over those of all
    lines.
    """
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    total = sum(map(len, lines))
    return 1 - sum(map(len, set(lines))) / total if total else 0.0


def repeated_ngram_fraction(text: str) -> float:
    """Runs of 5 words that stood in the text before, over all of them; 0 for a text with fewer than 20 runs."""
    long = StreamingShingler(_RUN)
    hashes = [*long.add(text), *long.end()]
    runs = sum(map(len, hashes))
    return 1 - len(np.unique(np.concatenate(hashes))) / runs if runs >= _ENOUGH_RUNS else 0.0


def build_filter(name: str, config: DataConfig) -> Filter:
    """The filter of that name with the settings' bounds; raises UsageError, naming the extra, where its
    library is missing.
    """
    if name == "length":
        return LengthFilter(config.min_characters, config.max_characters)
    if name == "symbols":
        return SymbolFilter(config.max_symbol_fraction)
    if name == "repetition":
        return RepetitionFilter(config.max_repeated_fraction)
    from llm_trainer.data.cleaning.datatrove_filters import DatatroveFilter

    return DatatroveFilter.named(name)
