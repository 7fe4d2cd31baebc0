"""Text in one form: Unicode, line ends, blanks, invisible characters, and lines that are a web page's
furniture.

What is done, in this order: every kind of line end becomes "\\n" and every kind of space " "; control and
invisible characters go; Unicode is composed (NFC, so that é is one character however it was typed); blanks at
the ends of lines go; boilerplate lines go; of many empty lines two stay, and none at the ends of the
document. What carries meaning stays: indentation and inner spaces (code, tables), tabs, the joiners of Indic
scripts and emoji, left-to-right and right-to-left marks. To do it twice is to do it once.

Most text needs little of it, and Python is slow character by character: each step first asks in one fast
search whether it has anything to do. A document in pieces is normalised line by line, so the result is that
of the whole, and memory that of a piece.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from llm_trainer.config.schema.data import DataConfig
from llm_trainer.data.cleaning.boilerplate import remove_boilerplate

_LINE_ENDS = re.compile("\r\n?|[\v\f\x1c-\x1e\x85\u2028\u2029]")
_ANY_LINE_END = re.compile("[\r\v\f\x1c-\x1e\x85\u2028\u2029]")
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1b\x1f\x7f]")
# All controls, soft hyphens, zero-width spaces, byte order marks, embeddings of direction, noncharacters;
# other kinds of spaces.
_SPECIAL = re.compile(
    "[\x00-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f\xa0\xad\u1680\u2000-\u200b\u202a-\u202f\u205f\u2060\u2066-\u2069\u3000\ufeff\ufff9-\ufffb"
    "\ufdd0-\ufdef\ufffe\uffff]"
)
_SPACES = frozenset(
    "\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
)
_BLANKS_AT_ENDS = re.compile("[ \t]+(?=\n)")
_MANY_EMPTY_LINES = re.compile("\n{4,}")
_SAFE_TO_CUT = re.compile(
    r"[^\W\d_](?= )|[!-~](?=[!-~])|[\u3400-\u9fff](?=[\u3400-\u9fff])"
)  # nothing composes, nothing is at an end
_LONGEST_LINE = 2**20  # characters; a longer one is normalised in parts


@dataclass(frozen=True)
class TextNormalizer:
    """What is done to text. With `unicode_form` "none" characters stay decomposed or composed as they are."""

    unicode_form: Literal["nfc", "nfkc", "none"] = "nfc"
    drop_boilerplate: bool = True

    @classmethod
    def of(cls, config: DataConfig) -> TextNormalizer:
        """What the settings ask for."""
        return cls(config.unicode_form, config.drop_boilerplate)

    def text(self, text: str) -> str:
        """A whole document; the empty text where nothing is left."""
        return "".join(self.blocks([text]))

    def blocks(self, pieces: Iterable[str]) -> Iterator[str]:
        """A document in pieces of any size; the results joined are the whole document normalised."""
        waiting = -1  # line ends held back: they may turn out to be the document's last; -1 before any text
        for lines, is_part in _whole_lines(pieces):
            done = self._characters(lines)
            if self.drop_boilerplate and not is_part:
                done = remove_boilerplate(done)
            inner = done.strip("\n")
            if not inner:
                waiting += len(done) if waiting >= 0 else 0
                continue
            before = len(done) - len(done.lstrip("\n"))
            yield "\n" * min(3, waiting + before) if waiting >= 0 else ""
            yield _MANY_EMPTY_LINES.sub("\n\n\n", inner) if "\n\n\n\n" in inner else inner
            waiting = len(done) - before - len(inner)

    def _characters(self, text: str) -> str:
        if text.isascii():
            text = _CONTROLS.sub("", text)
        else:
            text = _SPECIAL.sub(_in_place_of, text)
            form = self.unicode_form
            if form == "nfc" and not unicodedata.is_normalized("NFC", text):
                text = unicodedata.normalize("NFC", text)
            elif form == "nfkc" and not unicodedata.is_normalized("NFKC", text):
                text = unicodedata.normalize("NFKC", text)
        return _without_blanks_at_ends(text)


def _in_place_of(found: re.Match[str]) -> str:
    return " " if found[0] in _SPACES else ""


def _without_blanks_at_ends(text: str) -> str:
    """Plain replacing is ten times as fast as the pattern, and mostly there is one blank or none."""
    for _ in range(3):
        if " \n" not in text and "\t\n" not in text:
            return text
        text = text.replace(" \n", "\n").replace("\t\n", "\n")
    return _BLANKS_AT_ENDS.sub("", text)


def _with_one_line_end(pieces: Iterable[str]) -> Iterator[str]:
    held = ""
    for piece in pieces:
        text = held + piece
        held = "\r" if text.endswith("\r") else ""  # half of "\r\n", perhaps
        text = text.removesuffix("\r")
        yield _LINE_ENDS.sub("\n", text) if _ANY_LINE_END.search(text) else text
    yield "\n" if held else ""


def _whole_lines(pieces: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """(text, whether it is only part of a line): cut after line ends, and within very long lines where a word
    ends.
    """
    held, is_inside = "", False
    for piece in _with_one_line_end(pieces):
        held += piece
        end = held.rfind("\n") + 1
        if end and is_inside:
            rest = held.index("\n") + 1
            yield held[:rest], True
            held, end, is_inside = held[rest:], end - rest, False
        if end:
            yield held[:end], False
            held = held[end:]
        while len(held) > 2 * _LONGEST_LINE:
            cut = next((match.end() for match in _SAFE_TO_CUT.finditer(held, _LONGEST_LINE)), _LONGEST_LINE)
            yield held[:cut], True
            held, is_inside = held[cut:], True
    yield held + "\n", is_inside
