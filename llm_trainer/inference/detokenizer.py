"""Tokens to text as they arrive: complete characters, cut exactly at stop strings, and never a letter that
would have to be taken back.

Tokens are bytes, so that a character may arrive in halves, and a stop string may begin in one token and end
three tokens later. What is not certain yet is held back: an incomplete character, and any end of the text
that could be the start of a stop string. The concatenated pieces are therefore the complete text, however the
bytes were split into tokens. Of several stop strings, the one that is *complete* first ends the text (the
longest, if several are); that too does not depend on where tokens end.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class Detokenizer:
    """Collects the bytes of one completion and returns its text in final pieces."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        """Start a text.

        Args:
            stops: Stop strings; the text ends before the first of them. Empty ones are ignored.
        """
        self.stops = tuple(stop for stop in stops if stop)
        self.stopped = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, piece: bytes) -> str:
        """Add the bytes of the next token.

        Args:
            piece: The bytes.

        Returns:
            The text that is now certain; nothing after a stop string.
        """
        return self._release(self._decoder.decode(piece))

    def finish(self) -> str:
        """The rest of the text, at the end of generation.

        Half a character becomes U+FFFD, and an incomplete stop string is ordinary text.
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
    """Where the stop string begins that is complete first.

    Args:
        text: The text.
        stops: The stop strings; of those that are complete at the same character, the longest counts.

    Returns:
        Index in `text`, or None without a complete stop string.
    """
    found = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def longest_started_stop(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of the text are the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest
