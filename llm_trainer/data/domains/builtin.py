"""The domains that need no network: what every Python installation holds, and exercises made from a seed.

coding is the standard library's sources, general the language reference as `help()` shows it. The others have
no text on a machine without a network, so theirs is made: worked exercises, right but of a few kinds. They
stand in for the data sets; they do not replace them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from llm_trainer.config.schema.domain_loaders import DOMAINS
from llm_trainer.data.domains.loaders import DomainText
from llm_trainer.data.domains.synthetic.exercises import exercises
from llm_trainer.data.sources.builtin_corpus import language_reference, library_files, read_library

EXERCISES = 3000  # of each domain: half a megabyte to a megabyte of text
NAME = "builtin"

ABOUT: Mapping[str, str] = {
    "math": "exercises made from a seed, with worked answers",
    "science": "exercises of school physics and chemistry made from a seed, with worked answers",
    "coding": "the standard library's sources",
    "logic": "puzzles made from a seed, each with one answer",
    "reasoning": "word problems made from a seed, worked in steps",
    "general": "Python's language reference",
}


def builtin_examples(seed: int, count: int = EXERCISES) -> Iterator[DomainText]:
    """Every text of every built-in domain; `count` exercises of each domain that has them."""
    for domain in DOMAINS:
        if domain == "coding":
            texts = (raw.decode("utf-8", errors="replace") for _, raw in read_library(library_files()))
        elif domain == "general":
            texts = (text for _, text in language_reference())
        else:
            texts = (made.text() for made in exercises(domain, count, seed))
        yield from (DomainText(text, domain, NAME) for text in texts if text.strip() and "\0" not in text)
