"""The domains that need no network: text of every Python installation, and exercises generated from a seed.

The domain coding is the standard library's sources, and general is the language reference as `help()` shows
it. The other domains have no text on a machine without a network, so theirs is generated: worked exercises,
correct but of a few kinds. They are a substitute for trying things out, and do not replace the datasets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from llm_trainer.config.schema.domain_loaders import DOMAINS
from llm_trainer.data.domains.loaders import DomainText
from llm_trainer.data.domains.synthetic.exercises import exercises
from llm_trainer.data.sources.builtin_corpus import language_reference, library_files, read_library

NUM_EXERCISES = 3000
"""Exercises of each domain: half a megabyte to a megabyte of text."""
NAME = "builtin"

ABOUT: Mapping[str, str] = {
    "math": "exercises with worked answers, generated from a seed",
    "science": "exercises of school physics and chemistry with worked answers, generated from a seed",
    "coding": "the standard library's sources",
    "logic": "puzzles with one answer each, generated from a seed",
    "reasoning": "word problems worked in steps, generated from a seed",
    "general": "Python's language reference",
}


def builtin_texts(seed: int, count: int = NUM_EXERCISES) -> Iterator[DomainText]:
    """Yield every text of every built-in domain.

    Args:
        seed: The seed of the exercises.
        count: Number of exercises of each domain that has them.
    """
    for domain in DOMAINS:
        if domain == "coding":
            texts = (raw.decode("utf-8", errors="replace") for _, raw in read_library(library_files()))
        elif domain == "general":
            texts = (text for _, text in language_reference())
        else:
            texts = (exercise.text() for exercise in exercises(domain, count, seed))
        yield from (DomainText(text, domain, NAME) for text in texts if text.strip() and "\0" not in text)
