"""Text cut into words, exactly as a tokenizer's pattern cuts it, at several times the speed of the
tokenizers' own engine.

Tokenizers cut text by a regular expression first and then look at each word alone. Python's `re` does the
first step fast, if `\\p{L}` and its like are spelled out as sets of characters; words can then be counted, or
looked up, as the texts that they are.

Two engines may hold different versions of Unicode. A text with a character whose class has changed since
Unicode 3.2, which Python knows as well, or that is not assigned, or that lies beyond the basic plane without
being a pictograph, is cut by the tokenizers library itself; a test goes through all the others one by one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache

from tokenizers import Regex, pre_tokenizers

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Llama 3's and GPT-4's, as other engines know it; the first form is written without flags.
PATTERN = (
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
BERT_WORDS = "BertPreTokenizer"

# The same languages for `re`: what is frequent first, and possessive quantifiers, which do not backtrack.
_CONTRACTIONS = "'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_GPT4 = (
    rf" ?\p{{L}}++|{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?+\p{{L}}++|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_FOR_RE = {
    GPT2_PATTERN: r" ?\p{L}++| ?\p{N}++|'(?:[sdmt]|ll|ve|re)| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+",
    PATTERN: _GPT4,
    LLAMA3_PATTERN: _GPT4,
    QWEN2_PATTERN: _GPT4.replace("{1,3}", ""),
    O200K_PATTERN: O200K_PATTERN,
    BERT_WORDS: r"[^\s\p{P}\p{A}]+|[\p{P}\p{A}]",
}
_SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
_ASCII_SYMBOLS = "$+<=>^`|~"  # which BERT counts as punctuation; stands in patterns here as \p{A}
_BASIC_PLANE, _PICTOGRAPHS, _ALL = range(0x80, 0x10000), range(0x1F000, 0x1FB00), 0x110000
# Long s and the Kelvin sign fold into ASCII; the Mongolian separator was a space once.
_ALWAYS_UNCERTAIN = {0x17F, 0x180E, 0x212A}
_CLASS = re.compile(r"\\(?:p\{(\w+)\}|([sS]))")
_BLOCK = 2**16
_SAFE_CUT = re.compile(r"[^\W\d_](?= )")  # a letter before a space: every pattern above has a boundary there


class Words:
    """Cuts text into words; a text's words together are the text again, except where white space is no word
    (BERT).
    """

    def __init__(self, pattern: str) -> None:
        """`pattern` is one of those above, in the tokenizers' own spelling; raises KeyError for another."""
        self._pattern = _FOR_RE[pattern]
        self._for_ascii = re.compile(_translated(self._pattern, range(0x80)))
        self._library = (
            pre_tokenizers.Split(Regex(pattern), "isolated")
            if pattern != BERT_WORDS
            else pre_tokenizers.BertPreTokenizer()
        )

    @staticmethod
    def knows(pattern: str) -> bool:
        """Whether there are words for this pattern."""
        return pattern in _FOR_RE

    def cut(self, text: str) -> Iterator[list[str]]:
        """The words of `text`, in lists of bounded size."""
        start = 0
        while len(text) - start > 2 * _BLOCK:
            found = _SAFE_CUT.search(text, start + _BLOCK)
            if found is None:
                break
            yield self._cut(text[start : found.end()])
            start = found.end()
        yield self._cut(text[start:] if start else text)

    def _cut(self, text: str) -> list[str]:
        if text.isascii():
            return self._for_ascii.findall(text)
        for_all, uncertain = _for_unicode(self._pattern)
        if uncertain.search(text) is None:
            return for_all.findall(text)
        return [word for word, _ in self._library.pre_tokenize_str(text)]


@cache
def _for_unicode(pattern: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """The pattern over all of Unicode, and what matches the characters that it must not be asked about."""
    wanted = [found[1] for found in _CLASS.finditer(pattern) if found[1]]

    @cache  # there are few pairs of categories, and many characters
    def is_other_now(now: str, before: str) -> bool:
        return now == "Cn" or any(now.startswith(name) != before.startswith(name) for name in (*wanted, "Z"))

    certain, uncertain = [], set(_ALWAYS_UNCERTAIN)
    for point in (*_BASIC_PLANE, *_PICTOGRAPHS):
        character = chr(point)
        if (
            is_other_now(unicodedata.category(character), unicodedata.ucd_3_2_0.category(character))
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
    """The pattern with its classes spelled out for these code points."""
    by_category: dict[str, list[int]] = {}
    for point in points:
        by_category.setdefault(unicodedata.category(chr(point)), []).append(point)
    reach = {point for found in by_category.values() for point in found}

    def spelled(found: re.Match[str]) -> str:
        name, space = found[1], found[2]
        if space:
            members = [ord(character) for character in _SPACES if ord(character) in reach]
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

    return _CLASS.sub(spelled, pattern)


def _set_of(points: list[int]) -> str:
    """Sorted code points as the inside of a set."""
    ranges: list[tuple[int, int]] = []
    for point in points:
        if ranges and ranges[-1][1] == point - 1:
            ranges[-1] = (ranges[-1][0], point)
        else:
            ranges.append((point, point))
    return "".join(f"{_escaped(a)}-{_escaped(b)}" for a, b in ranges)


def _escaped(point: int) -> str:
    return f"\\U{point:08x}"
