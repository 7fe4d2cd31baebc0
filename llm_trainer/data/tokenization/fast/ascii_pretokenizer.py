"""Where words begin in ASCII text, for many characters at once.

The patterns that cut GPT-2's, GPT-4's, Llama 3's and Qwen 2's words look at the class of a character (letter,
digit, mark, blank, line break) and at its neighbours, hardly further. So the beginnings of all words of a
buffer are a few comparisons of whole arrays, at five times the speed of a regular expression. `Words` is what
they must agree with, and a test compares them on any text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llm_trainer.data.tokenization.fast.pretokenizer import (
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    PATTERN,
    QWEN2_PATTERN,
)

SEPARATOR = 0xFF  # stands around each text of a buffer; no byte of utf-8
_LETTER, _DIGIT, _MARK, _BLANK, _BREAK, _END = 1, 2, 4, 8, 16, 32
_WHITE = _BLANK | _BREAK
_APOSTROPHE, _SPACE, _LOWER = ord("'"), ord(" "), 0x20
_ENDINGS = tuple((ord(first), ord(second)) for first, second in ("re", "ve", "ll"))
_SHORT_ENDINGS = np.frombuffer(b"sdmt", np.uint8)


@dataclass(frozen=True)
class Rules:
    """What a pattern does. `digits`: digits a word has at most (0: any number); `marks_join`: a single mark
    or blank joins the letters behind it, and line breaks are words of their own; otherwise a space joins
    whatever is behind it.
    """

    digits: int
    marks_join: bool


RULES = {
    PATTERN: Rules(3, True),
    LLAMA3_PATTERN: Rules(3, True),
    QWEN2_PATTERN: Rules(1, True),
    GPT2_PATTERN: Rules(0, False),
}


def _classes() -> bytes:
    classes = (
        bytearray([_LETTER]) * 256
    )  # beyond ASCII the class is not known, and nothing that is said there holds
    for point in range(0x80):
        letter = chr(point)
        white = _BREAK if letter in "\r\n" else _BLANK if letter in " \t\v\f" else _MARK
        classes[point] = _LETTER if letter.isalpha() else _DIGIT if letter.isdigit() else white
    classes[SEPARATOR] = _END
    return bytes(classes)


_CLASSES = _classes()


def word_starts(raw: bytes, rules: Rules) -> np.ndarray:
    """Which bytes of `raw` begin a word: bool `(bytes,)`. `raw` is ASCII texts with SEPARATOR between, before
    and after.
    """
    buffer, kinds = np.frombuffer(raw, np.uint8), np.frombuffer(raw.translate(_CLASSES), np.uint8)
    before, after = np.zeros_like(kinds), np.zeros_like(kinds)
    before[1:], after[:-1] = kinds[:-1], kinds[1:]
    is_run_start = kinds != before
    starts: np.ndarray = is_run_start | (kinds == _END)
    after_space = np.zeros(len(buffer), bool)
    after_space[1:] = buffer[:-1] == _SPACE
    is_lone_mark = (kinds == _MARK) & is_run_start & (after == _LETTER) & ~after_space
    if rules.marks_join:
        joins = (kinds == _LETTER) & (before == _BLANK)
        joins[1:] |= is_lone_mark[:-1]
        joins |= (kinds == _MARK) & after_space
        joins |= (kinds == _BREAK) & (before == _MARK)
    else:
        joins = after_space & ((kinds & (_LETTER | _DIGIT | _MARK)) != 0)
    starts &= ~(joins & is_run_start)
    is_inner = (
        is_run_start & ((kinds & _WHITE) != 0) & ((before & _WHITE) != 0)
    )  # from blanks to breaks or back
    starts &= ~is_inner
    last_white = kinds == _BLANK if rules.marks_join else (kinds & _WHITE) != 0
    starts |= last_white & ((after & (_LETTER | _DIGIT | _MARK)) != 0)
    if rules.marks_join:
        is_blank_end = (
            (kinds == _BLANK) & (after != _BLANK) & ((before & _WHITE) != 0)
        )  # but for single ones between words, which are many
        breaks = np.flatnonzero((kinds == _BREAK) & is_run_start)
        _start_after_breaks(
            starts, kinds, breaks, np.flatnonzero(is_inner & (kinds == _BLANK)), np.flatnonzero(is_blank_end)
        )
    _start_after_contractions(
        starts, buffer, kinds, np.flatnonzero(is_lone_mark & (buffer == _APOSTROPHE)), rules
    )
    if rules.digits:
        _start_digits(starts, is_run_start, np.flatnonzero(kinds == _DIGIT), rules.digits)
    return starts


def _start_after_breaks(
    starts: np.ndarray, kinds: np.ndarray, breaks: np.ndarray, blanks: np.ndarray, ends: np.ndarray
) -> None:
    """Blanks behind line breaks: a word begins where no further break follows, or where the breaks belonged
    to a mark.

    `breaks` and `blanks` are where runs of either begin, the latter behind a break; `ends` are the last blanks of runs.
    """
    if len(blanks) == 0:
        return
    behind = kinds[ends[np.searchsorted(ends, blanks)] + 1]
    in_front = kinds[breaks[np.searchsorted(breaks, blanks) - 1] - 1]
    starts[blanks] |= (behind != _BREAK) | (in_front == _MARK)


def _start_after_contractions(
    starts: np.ndarray, buffer: np.ndarray, kinds: np.ndarray, apostrophes: np.ndarray, rules: Rules
) -> None:
    """`'s` and its like are words: what letters follow them begin another. The apostrophes begin words and
    have a letter behind them.
    """
    if len(apostrophes) == 0:
        return
    first, second = buffer[apostrophes + 1], buffer[apostrophes + 2]
    if rules.marks_join:  # capitals too
        first, second = first | _LOWER, second | _LOWER
    is_short = np.isin(first, _SHORT_ENDINGS)
    is_long = np.zeros(len(apostrophes), bool)
    for one, other in _ENDINGS:
        is_long |= (first == one) & (second == other)
    if not rules.marks_join:
        starts[(apostrophes + 1)[is_short | is_long]] = False
    ends = np.concatenate([(apostrophes + 2)[is_short], (apostrophes + 3)[is_long]])
    starts[ends[kinds[ends] == _LETTER]] = True


def _start_digits(starts: np.ndarray, is_run_start: np.ndarray, places: np.ndarray, most: int) -> None:
    """Every so many digits begin a word."""
    if len(places) == 0:
        return
    numbers = np.arange(len(places))
    first = np.maximum.accumulate(np.where(is_run_start[places], numbers, 0))
    starts[places[(numbers - first) % most == 0]] = True
