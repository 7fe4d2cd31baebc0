"""The published quality filters, as implemented in datatrove (the extra `quality`).

These are Gopher's two sets, C4's, and what FineWeb added: gopher_repetition and gopher_quality (Rae et al.
2021, arXiv:2112.11446), c4 (Raffel et al. 2020, arXiv:1910.10683) and fineweb (Penedo et al. 2024,
arXiv:2406.17557). They run in the library that made FineWeb, with its defaults, instead of a copy of the
rules. All are made for English web pages: they count English stop words and sentences, and reject most code.
c4 also drops the lines that its rules reject.

Words are spaCy's, whose arrays take some hundred bytes per word. So a text is judged by its first million
characters, and c4 leaves longer texts unchanged.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import JsonValue

from llm_trainer.data.cleaning.base import FilterResult
from llm_trainer.data.optional_deps import require_extra

if TYPE_CHECKING:
    from datatrove.pipeline.filters.base_filter import BaseFilter

_MAX_CHARACTERS = 10**6


@dataclass(frozen=True)
class DatatroveFilter:
    """One of datatrove's filters.

    Attributes:
        name: Our name for it: gopher_repetition, gopher_quality, c4 or fineweb.
        versions: The versions of datatrove and spaCy.
    """

    name: str
    versions: tuple[str, str]

    @classmethod
    def from_name(cls, name: str) -> DatatroveFilter:
        """Build a filter by its name.

        Raises:
            UsageError: datatrove, or spaCy, which splits texts into words for it, is not installed.
        """
        feature = f"the filter {name!r}"
        return cls(
            name,
            (
                f"datatrove {require_extra('datatrove', 'quality', feature)}",
                f"spacy {require_extra('spacy', 'quality', feature)}",
            ),
        )

    @property
    def changes_text(self) -> bool:
        """Whether it may change a text that it keeps: c4 drops lines."""
        return self.name == "c4"

    @property
    def key(self) -> JsonValue:
        """The name and the versions; the library's defaults are the rules."""
        return {self.name: [*self.versions, _MAX_CHARACTERS]}

    def apply(self, text: str) -> FilterResult:
        """Keep or reject a text; the reason is datatrove's, after the filter's name."""
        from datatrove.data import Document

        document = Document(text=text[:_MAX_CHARACTERS], id="")
        answer = _load_filter(self.name).filter(document)
        is_kept, reason = answer if isinstance(answer, tuple) else (answer, "")
        if not is_kept:
            return FilterResult(
                f"{self.name}: {reason.removeprefix('gopher_').replace('_', ' ')}".removesuffix(": "), text
            )
        return FilterResult(
            None, document.text if self.changes_text and len(text) <= _MAX_CHARACTERS else text
        )


@functools.cache
def _load_filter(name: str) -> BaseFilter:
    """The library's filter, one per process: it loads spaCy's rules on first use."""
    from datatrove.pipeline import filters

    kinds = {
        "gopher_repetition": filters.GopherRepetitionFilter,
        "gopher_quality": filters.GopherQualityFilter,
        "c4": filters.C4QualityFilter,
        "fineweb": filters.FineWebQualityFilter,
    }
    return kinds[name]()
