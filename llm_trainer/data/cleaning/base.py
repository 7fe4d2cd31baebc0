"""What a filter is: it looks at a complete document and returns why it rejects it, or None.

Reasons are a few fixed phrases, so that rejected documents can be counted by reason.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from pydantic import JsonValue


class FilterResult(NamedTuple):
    """What a filter returns for a text.

    Attributes:
        reason: Why the text is rejected; None if it is kept.
        text: The text, which a filter may have changed.
    """

    reason: str | None
    text: str


class Filter(Protocol):
    """Keeps or rejects complete documents."""

    @property
    def changes_text(self) -> bool:
        """Whether it may change texts that it keeps; such a filter also runs on texts known to be kept."""

    @property
    def key(self) -> JsonValue:
        """Everything that determines its results, for cache keys."""

    def apply(self, text: str) -> FilterResult:
        """Keep or reject a text."""
