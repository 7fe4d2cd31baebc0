"""Published quality filters, as datatrove has them (the extra 'quality'): Gopher's two sets, C4's, and what
FineWeb added.

They run in the library that made FineWeb, with its defaults, and not in a copy: gopher_repetition and
gopher_quality (Rae et al. 2021, arXiv:2112.11446), c4 (Raffel et al. 2020, arXiv:1910.10683), fineweb (Penedo
et al. 2024, arXiv:2406.17557). All are made for English web pages: they count English stop words and
sentences, and refuse most code. c4 also drops the lines that its rules refuse.

Words are spaCy's, whose arrays take some hundred bytes a word; so a text is judged by its first million
characters, and c4 leaves longer ones as they are.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import JsonValue

from llm_trainer.data.cleaning.filters import FilterResult
from llm_trainer.data.optional_deps import require_extra

if TYPE_CHECKING:
    from datatrove.pipeline.filters.base_filter import BaseFilter

_JUDGED_CHARACTERS = 10**6


@dataclass(frozen=True)
class DatatroveFilter:
    """One of datatrove's filters by our name for it."""

    name: str
    versions: tuple[str, str]

    @classmethod
    def named(cls, name: str) -> DatatroveFilter:
        """By name; raises UsageError where datatrove, or the spaCy that splits its words, is not installed."""
        what = f"the filter {name!r}"
        return cls(
            name,
            (
                f"datatrove {require_extra('datatrove', 'quality', what)}",
                f"spacy {require_extra('spacy', 'quality', what)}",
            ),
        )

    @property
    def changes_text(self) -> bool:
        """c4 drops lines."""
        return self.name == "c4"

    @property
    def key(self) -> JsonValue:
        """Name and versions: the library's defaults are the rules."""
        return {self.name: [*self.versions, _JUDGED_CHARACTERS]}

    def apply(self, text: str) -> FilterResult:
        """What datatrove says; its reason with the filter's name before it."""
        from datatrove.data import Document

        document = Document(text=text[:_JUDGED_CHARACTERS], id="")
        said = _filter(self.name).filter(document)
        is_kept, reason = said if isinstance(said, tuple) else (said, "")
        if not is_kept:
            return FilterResult(
                f"{self.name}: {reason.removeprefix('gopher_').replace('_', ' ')}".removesuffix(": "), text
            )
        return FilterResult(
            None, document.text if self.changes_text and len(text) <= _JUDGED_CHARACTERS else text
        )


@functools.cache
def _filter(name: str) -> BaseFilter:
    """The library's object, one a process: it loads spaCy's rules on first use."""
    from datatrove.pipeline import filters

    kinds = {
        "gopher_repetition": filters.GopherRepetitionFilter,
        "gopher_quality": filters.GopherQualityFilter,
        "c4": filters.C4QualityFilter,
        "fineweb": filters.FineWebQualityFilter,
    }
    return kinds[name]()
