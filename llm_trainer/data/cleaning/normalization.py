"""Text normalization: Unicode, line ends, whitespace, invisible characters and boilerplate lines.

The steps are, in this order: every kind of line end becomes "\\n" and every kind of space " "; control and
invisible characters are removed; Unicode is composed (NFC, so that é is one character however it was typed);
whitespace at the ends of lines is removed; boilerplate lines are removed; of many empty lines two are kept,
and none at the ends of the document. What carries meaning is kept: indentation and inner spaces (code,
tables), tabs, the joiners of Indic scripts and emoji, left-to-right and right-to-left marks. Normalization is
idempotent.

Most text needs few changes, and Python is slow character by character, so each step first checks with one
fast search whether it has anything to do. A document in chunks is normalized line by line: the result is that
of the complete text, and the memory that of a chunk.
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
# All controls, soft hyphens, zero-width spaces, byte order marks, directional embeddings, noncharacters, and
# other kinds of spaces.
_SPECIAL = re.compile(
    "[\x00-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f\xa0\xad\u1680\u2000-\u200b\u202a-\u202f\u205f\u2060\u2066-\u2069\u3000\ufeff"
    "\ufff9-\ufffb\ufdd0-\ufdef\ufffe\uffff]"
)
_SPACES = frozenset(
    "\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
)
_TRAILING_WHITESPACE = re.compile("[ \t]+(?=\n)")
_MANY_EMPTY_LINES = re.compile("\n{4,}")
# Positions at which a line can be divided: nothing composes across them, and no whitespace is at an end.
_SAFE_POSITION = re.compile(r"[^\W\d_](?= )|[!-~](?=[!-~])|[\u3400-\u9fff](?=[\u3400-\u9fff])")
_MAX_LINE_CHARACTERS = 2**20  # a longer line is normalized in parts


@dataclass(frozen=True)
class TextNormalizer:
    """The normalization of text.

    Attributes:
        unicode_form: The Unicode normalization form; "none" leaves characters composed or decomposed as they
            are.
        drop_boilerplate: Whether boilerplate lines of web pages are removed.
    """

    unicode_form: Literal["nfc", "nfkc", "none"] = "nfc"
    drop_boilerplate: bool = True

    @classmethod
    def from_config(cls, config: DataConfig) -> TextNormalizer:
        """Build the normalizer of a configuration."""
        return cls(config.unicode_form, config.drop_boilerplate)

    def normalize(self, text: str) -> str:
        """Normalize a complete document; the result is empty if nothing is left."""
        return "".join(self.normalize_blocks([text]))

    def normalize_blocks(self, blocks: Iterable[str]) -> Iterator[str]:
        """Normalize a document that comes in blocks of any size.

        Args:
            blocks: The document's text, divided anywhere.

        Yields:
            Blocks that, concatenated, are the normalized document.
        """
        pending_line_ends = -1  # not yielded yet, as they may be the document's last; -1 before any text
        for lines, is_part in _complete_lines(blocks):
            done = self._normalize_characters(lines)
            if self.drop_boilerplate and not is_part:
                done = remove_boilerplate(done)
            inner = done.strip("\n")
            if not inner:
                pending_line_ends += len(done) if pending_line_ends >= 0 else 0
                continue
            before = len(done) - len(done.lstrip("\n"))
            yield "\n" * min(3, pending_line_ends + before) if pending_line_ends >= 0 else ""
            yield _MANY_EMPTY_LINES.sub("\n\n\n", inner) if "\n\n\n\n" in inner else inner
            pending_line_ends = len(done) - before - len(inner)

    def _normalize_characters(self, text: str) -> str:
        if text.isascii():
            text = _CONTROLS.sub("", text)
        else:
            text = _SPECIAL.sub(_replacement, text)
            form = self.unicode_form
            if form == "nfc" and not unicodedata.is_normalized("NFC", text):
                text = unicodedata.normalize("NFC", text)
            elif form == "nfkc" and not unicodedata.is_normalized("NFKC", text):
                text = unicodedata.normalize("NFKC", text)
        return _strip_line_ends(text)


def _replacement(found: re.Match[str]) -> str:
    return " " if found[0] in _SPACES else ""


def _strip_line_ends(text: str) -> str:
    """Remove whitespace at the ends of lines.

    Plain replacement is ten times as fast as the pattern, and mostly there is one character or none.
    """
    for _ in range(3):
        if " \n" not in text and "\t\n" not in text:
            return text
        text = text.replace(" \n", "\n").replace("\t\n", "\n")
    return _TRAILING_WHITESPACE.sub("", text)


def _unify_line_ends(blocks: Iterable[str]) -> Iterator[str]:
    pending = ""
    for block in blocks:
        text = pending + block
        pending = "\r" if text.endswith("\r") else ""  # perhaps the first half of "\r\n"
        text = text.removesuffix("\r")
        yield _LINE_ENDS.sub("\n", text) if _ANY_LINE_END.search(text) else text
    yield "\n" if pending else ""


def _complete_lines(blocks: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """(text, whether it is only part of a line): divided after line ends, and after words in long lines."""
    pending, is_inside_line = "", False
    for block in _unify_line_ends(blocks):
        pending += block
        end = pending.rfind("\n") + 1
        if end and is_inside_line:
            rest = pending.index("\n") + 1
            yield pending[:rest], True
            pending, end, is_inside_line = pending[rest:], end - rest, False
        if end:
            yield pending[:end], False
            pending = pending[end:]
        while len(pending) > 2 * _MAX_LINE_CHARACTERS:
            matches = _SAFE_POSITION.finditer(pending, _MAX_LINE_CHARACTERS)
            end = next((match.end() for match in matches), _MAX_LINE_CHARACTERS)
            yield pending[:end], True
            pending, is_inside_line = pending[end:], True
    yield pending + "\n", is_inside_line
