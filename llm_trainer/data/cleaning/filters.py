"""The built-in filters: length, symbols and repetition.

They are simple rules in the spirit of Gopher (Rae et al. 2021, arXiv:2112.11446, appendix A.1), meant for any
kind of text in any language, code included. The published filter sets are for English web pages;
`datatrove_filters.py` runs them with datatrove, the library that made FineWeb.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

import numpy as np
from pydantic import JsonValue

from llm_trainer.data.cleaning.base import FilterResult
from llm_trainer.data.deduplication.shingles import StreamingShingler

_NOT_SYMBOLS = bytes(
    byte for byte in range(256) if byte >= 0x80 or chr(byte).isalnum() or chr(byte).isspace()
)
_NOT_VISIBLE = bytes(byte for byte in range(256) if byte >= 0x80 or chr(byte).isspace())
_ASCII = re.compile("[\x00-\x7f]+")
_NGRAM_WORDS = 5
_MIN_NGRAMS = 20
"""With fewer word n-grams, the fraction of repeated ones means little."""


@dataclass(frozen=True)
class LengthFilter:
    """Rejects documents of too few or too many characters; whitespace at the ends is not counted."""

    min_characters: int
    max_characters: int
    changes_text = False

    @property
    def key(self) -> JsonValue:
        """The bounds."""
        return {"length": {"min_characters": self.min_characters, "max_characters": self.max_characters}}

    def apply(self, text: str) -> FilterResult:
        """Keep or reject a text by its number of characters."""
        length = len(text.strip())
        if length < self.min_characters:
            return FilterResult(f"shorter than {self.min_characters} characters", text)
        return FilterResult(
            f"longer than {self.max_characters} characters" if length > self.max_characters else None, text
        )


@dataclass(frozen=True)
class SymbolFilter:
    """Rejects documents with too large a fraction of symbols: neither letters, digits nor whitespace.

    The fraction is of all characters but whitespace. It is 0.06 in Shakespeare's plays, 0.16 in files of
    Python's standard library (median; 99 % are below 0.32), and 0.5 or more in tables in ASCII art, operators
    and markup.
    """

    max_symbol_fraction: float
    changes_text = False

    @property
    def key(self) -> JsonValue:
        """The bound."""
        return {
            "symbols": {"max_symbol_share": self.max_symbol_fraction}
        }  # the name that caches already have

    def apply(self, text: str) -> FilterResult:
        """Keep or reject a text by its fraction of symbols."""
        is_rejected = symbol_fraction(text) > self.max_symbol_fraction
        return FilterResult("too many symbols" if is_rejected else None, text)


@dataclass(frozen=True)
class RepetitionFilter:
    """Rejects documents that repeat themselves.

    Two fractions are computed: of characters in repeated lines, and of repeated word 5-grams. Of the files of
    Python's standard library, 99 % are below 0.25 in both, and none is above 0.44.
    """

    max_repeated_fraction: float
    changes_text = False

    @property
    def key(self) -> JsonValue:
        """The bound."""
        return {"repetition": {"max_repeated_share": self.max_repeated_fraction}}  # as in existing caches

    def apply(self, text: str) -> FilterResult:
        """Keep or reject a text by its repeated lines, then by its repeated word n-grams."""
        if repeated_line_fraction(text) > self.max_repeated_fraction:
            return FilterResult("repeated lines", text)
        is_rejected = repeated_ngram_fraction(text) > self.max_repeated_fraction
        return FilterResult("repeated words" if is_rejected else None, text)


def symbol_fraction(text: str) -> float:
    """Return the symbols (neither letters, digits nor whitespace) per character that is not whitespace."""
    raw = text.encode("utf-8")
    symbols, visible = len(raw.translate(None, _NOT_SYMBOLS)), len(raw.translate(None, _NOT_VISIBLE))
    if not text.isascii():
        for character, count in Counter(_ASCII.sub("", text)).items():
            # Letter, mark (the vowels of Indic scripts), number; punctuation, symbol, other; separator.
            category = unicodedata.category(character)[0]
            visible += 0 if character.isspace() else count
            symbols += count if category in "PSC" and not character.isspace() else 0
    return symbols / visible if visible else 0.0


def repeated_line_fraction(text: str) -> float:
    """Return the fraction of characters that are in lines which occur earlier in the text.

    Whitespace at the ends of lines is ignored.
    """
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    total = sum(map(len, lines))
    return 1 - sum(map(len, set(lines))) / total if total else 0.0


def repeated_ngram_fraction(text: str) -> float:
    """Return the fraction of word 5-grams that occur earlier in the text; 0 for a text with fewer than 20."""
    shingler = StreamingShingler(_NGRAM_WORDS)
    hashes = [*shingler.add(text), *shingler.end()]
    ngrams = sum(map(len, hashes))
    return 1 - len(np.unique(np.concatenate(hashes))) / ngrams if ngrams >= _MIN_NGRAMS else 0.0
