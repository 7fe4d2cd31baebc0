"""Splits text into words with Python's `re`, exactly as a tokenizer's pattern splits it.

* What: tokenizers split text by a regular expression first, and then encode each word alone. Python's `re`
  executes such a pattern if `\\p{L}` and similar classes are written out as sets of characters.
* Why: it is several times as fast as the library's own engine, and the words are Python strings that can be
  counted and looked up.
* Must equal: the pre-tokenizers of the `tokenizers` library; `tests/data/tokenization/test_pretokenizer.py`
  compares them on random text, and character by character. The two engines may have different versions of
  Unicode. So the library itself splits a text with a character whose class has changed since Unicode 3.2
  (which Python knows as well), that is not assigned, or that is beyond the basic plane and not a pictograph.
* Switch off: LLM_TRAINER_FAST_TOKENIZER=0.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache

from tokenizers import Regex, pre_tokenizers

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The pattern of Llama 3 and GPT-4, with which vocabularies are trained. It is written without flags, so that
# other engines know it; LLAMA3_PATTERN is the same in the spelling of Llama 3's files.
DEFAULT_PATTERN = (
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")
_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
O200K_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BERT_PATTERN = "BertPreTokenizer"

# The same for `re`: frequent alternatives come first, and possessive quantifiers do not backtrack.
_CONTRACTIONS = "'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_GPT4 = (
    rf" ?\p{{L}}++|{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?+\p{{L}}++|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_FOR_RE = {
    GPT2_PATTERN: r" ?\p{L}++| ?\p{N}++|'(?:[sdmt]|ll|ve|re)| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+",
    DEFAULT_PATTERN: _GPT4,
    LLAMA3_PATTERN: _GPT4,
    QWEN2_PATTERN: _GPT4.replace("{1,3}", ""),
    O200K_PATTERN: O200K_PATTERN,
    BERT_PATTERN: r"[^\s\p{P}\p{A}]+|[\p{P}\p{A}]",
}
_SPACES = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006"
    "\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)
_ASCII_SYMBOLS = "$+<=>^`|~"  # which BERT counts as punctuation; \p{A} in the patterns here
_BASIC_PLANE, _PICTOGRAPHS, _ALL = range(0x80, 0x10000), range(0x1F000, 0x1FB00), 0x110000
# Long s and the Kelvin sign fold into ASCII; the Mongolian separator used to be a space.
_ALWAYS_UNCERTAIN = {0x17F, 0x180E, 0x212A}
_CLASS = re.compile(r"\\(?:p\{(\w+)\}|([sS]))")
_BLOCK = 2**16
_SAFE_BOUNDARY = re.compile(r"[^\W\d_](?= )")  # a letter before a space: all patterns split there


class RegexPreTokenizer:
    """Splits text into words; together they are the text again, except for BERT, which drops whitespace."""

    def __init__(self, pattern: str) -> None:
        """Compile a pattern.

        Args:
            pattern: One of the patterns of this module, in the spelling of tokenizer.json.

        Raises:
            KeyError: The pattern is not supported.
        """
        self._pattern = _FOR_RE[pattern]
        self._for_ascii = re.compile(_translated(self._pattern, range(0x80)))
        self._library = (
            pre_tokenizers.Split(Regex(pattern), "isolated")
            if pattern != BERT_PATTERN
            else pre_tokenizers.BertPreTokenizer()
        )

    @staticmethod
    def supports(pattern: str) -> bool:
        """Whether the pattern is one of those of this module."""
        return pattern in _FOR_RE

    def split(self, text: str) -> Iterator[list[str]]:
        """Split a text into its words, which are yielded in lists of bounded size."""
        start = 0
        while len(text) - start > 2 * _BLOCK:
            found = _SAFE_BOUNDARY.search(text, start + _BLOCK)
            if found is None:
                break
            yield self._split(text[start : found.end()])
            start = found.end()
        yield self._split(text[start:] if start else text)

    def _split(self, text: str) -> list[str]:
        if text.isascii():
            return self._for_ascii.findall(text)
        for_all, uncertain = _for_unicode(self._pattern)
        if uncertain.search(text) is None:
            return for_all.findall(text)
        return [word for word, _ in self._library.pre_tokenize_str(text)]


@cache
def _for_unicode(pattern: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """The pattern for all of Unicode, and one that matches the characters whose class is uncertain."""
    wanted = [found[1] for found in _CLASS.finditer(pattern) if found[1]]

    @cache  # there are few pairs of categories, and many characters
    def has_changed(now: str, before: str) -> bool:
        return now == "Cn" or any(now.startswith(name) != before.startswith(name) for name in (*wanted, "Z"))

    certain, uncertain = [], set(_ALWAYS_UNCERTAIN)
    for point in (*_BASIC_PLANE, *_PICTOGRAPHS):
        character = chr(point)
        if (
            has_changed(unicodedata.category(character), unicodedata.ucd_3_2_0.category(character))
            or point in _ALWAYS_UNCERTAIN
        ):
            uncertain.add(point)
        else:
            certain.append(point)
    beyond = ((_BASIC_PLANE.stop, _PICTOGRAPHS.start - 1), (_PICTOGRAPHS.stop, _ALL - 1))
    outside = "".join(f"{_escaped(a)}-{_escaped(b)}" for a, b in beyond)
    return re.compile(_translated(pattern, (*range(0x80), *certain))), re.compile(
        f"[{_set_of(sorted(uncertain))}{outside}]"
    )


def _translated(pattern: str, points: Iterable[int]) -> str:
    """The pattern with its classes written out as sets of these code points."""
    by_category: dict[str, list[int]] = {}
    for point in points:
        by_category.setdefault(unicodedata.category(chr(point)), []).append(point)
    covered = {point for found in by_category.values() for point in found}

    def written_out(found: re.Match[str]) -> str:
        name, space = found[1], found[2]
        if space:
            members = [ord(character) for character in _SPACES if ord(character) in covered]
        elif name == "A":
            members = [ord(character) for character in _ASCII_SYMBOLS]
        else:
            members = [
                point
                for category, found in by_category.items()
                if category.startswith(name)
                for point in found
            ]
        is_inside = pattern.rfind("[", 0, found.start()) > pattern.rfind("]", 0, found.start())
        listed = _set_of(sorted(members))
        if is_inside:
            return listed
        return f"[^{listed}]" if space == "S" else f"[{listed}]"

    return _CLASS.sub(written_out, pattern)


def _set_of(points: list[int]) -> str:
    """Sorted code points as the contents of a set in a regular expression."""
    ranges: list[tuple[int, int]] = []
    for point in points:
        if ranges and ranges[-1][1] == point - 1:
            ranges[-1] = (ranges[-1][0], point)
        else:
            ranges.append((point, point))
    return "".join(f"{_escaped(a)}-{_escaped(b)}" for a, b in ranges)


def _escaped(point: int) -> str:
    return f"\\U{point:08x}"
