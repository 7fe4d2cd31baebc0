"""Exercises with worked answers, made from a seed: the built-in domains that have no text in every Python
installation.

Exercise i of a domain is a function of the domain, the seed and i alone, so any number of them can be made
anywhere in any order. Each kind draws its numbers, words and phrasing, works the answer out step by step, and
is checked by a test that finds the answer in another way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

NAMES = (
    "Ada", "Ben", "Clara", "David", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kofi", "Lena", "Mara", "Nadia", "Omar", "Priya",
    "Quinn", "Rosa", "Samir", "Tara", "Uma", "Viktor", "Wanda", "Ximena", "Yusuf", "Zoe",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Exercise:
    """A question, the steps to its answer, and the answer by itself. `kind` is the name of what made it."""

    kind: str
    question: str
    steps: Sequence[str]
    answer: str

    def text(self) -> str:
        """As a document."""
        return f"Question: {self.question}\n\nSolution: {' '.join(self.steps)}\n\nAnswer: {self.answer}"


Kind = Callable[[Random], tuple[str, Sequence[str], str]]
"""Draws one exercise: question, steps, answer."""


def kinds(domain: str) -> Mapping[str, Kind]:
    """The kinds of exercise that a domain has, by name."""
    from llm_trainer.data.domains.synthetic import logic as exercises_logic
    from llm_trainer.data.domains.synthetic import math as exercises_math
    from llm_trainer.data.domains.synthetic import reasoning as exercises_reasoning
    from llm_trainer.data.domains.synthetic import science as exercises_science

    modules = {
        "math": exercises_math,
        "logic": exercises_logic,
        "reasoning": exercises_reasoning,
        "science": exercises_science,
    }
    return {kind.__name__: kind for kind in modules[domain].KINDS}


def exercise(domain: str, index: int, seed: int) -> Exercise:
    """Exercise `index` of a domain."""
    rng = Random(f"{domain} {seed} {index}")
    name, kind = rng.choice(sorted(kinds(domain).items()))
    question, steps, answer = kind(rng)
    return Exercise(name, question, steps, answer)


def exercises(domain: str, count: int, seed: int) -> Iterator[Exercise]:
    """The first `count` exercises of a domain that differ from each other."""
    seen: set[str] = set()
    index = 0
    while len(seen) < count:
        made = exercise(domain, index, seed)
        index += 1
        if made.question not in seen:
            seen.add(made.question)
            yield made


def listed(words: Sequence[str], last: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def money(cents: int) -> str:
    """`$3`, `$3.50`."""
    return f"${cents // 100}" if cents % 100 == 0 else f"${cents // 100}.{cents % 100:02d}"
