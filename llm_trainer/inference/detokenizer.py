"""Tokens to text as they come: whole characters, cut exactly at stop strings, never a letter that would have
to be taken back.

Tokens are bytes, so a character may arrive in halves and a stop string may begin in one token and end three
tokens later. What is not yet certain is held back: an unfinished character, and any end of the text that
could be the start of a stop string. The pieces joined are therefore the whole text, however the bytes were
split into tokens. Of several stop strings, the one that is *complete* first ends the text (of those the
longest): that too does not depend on where tokens end.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Collects the bytes of one answer and gives out its text in final pieces."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.stops = tuple(stop for stop in stops if stop)
        self.stopped = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, piece: bytes) -> str:
        """Take the next token's bytes; return the text that is now certain. After a stop string, nothing
        more.
        """
        return self._release(self._decoder.decode(piece))

    def finish(self) -> str:
        """The rest, at the end of generation: half a character becomes U+FFFD, and a stop string only begun
        is ordinary text.
        """
        text = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return text + rest

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        cut = first_stop(self._held, self.stops)
        if cut is not None:
            self.stopped = True
            released, self._held = self._held[:cut], ""
            return released
        keep = longest_started_stop(self._held, self.stops)
        released, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return released


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop string begins that is complete first in `text` (of those complete at once, the longest);
    none: None.
    """
    found = [(begin + len(stop), begin) for stop in stops if (begin := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def longest_started_stop(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` are the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest
