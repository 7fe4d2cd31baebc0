"""What generated exercises have in common: the exercise itself, the type of its generators, and phrasing.

The modules `math`, `logic`, `reasoning` and `science` have the generators; `exercises` selects among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeAlias

NAMES = (
    "Ada", "Ben", "Clara", "David", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kofi", "Lena",
    "Mara", "Nadia", "Omar", "Priya", "Quinn", "Rosa", "Samir", "Tara", "Uma", "Viktor", "Wanda", "Ximena",
    "Yusuf", "Zoe",
)  # fmt: skip

QuestionStepsAnswer: TypeAlias = tuple[str, Sequence[str], str]
"""A question, the steps to its answer, and the answer."""

Generator: TypeAlias = Callable[[Random], QuestionStepsAnswer]
"""Draws one exercise. Its name is the kind of the exercise, and part of the order in which kinds are drawn.
"""


@dataclass(frozen=True, slots=True)
class Exercise:
    """A question with a worked answer.

    Attributes:
        kind: The name of its generator.
        question: The question.
        steps: The steps to the answer, as sentences.
        answer: The answer alone.
    """

    kind: str
    question: str
    steps: Sequence[str]
    answer: str

    def text(self) -> str:
        """Return the exercise as a document."""
        return f"Question: {self.question}\n\nSolution: {' '.join(self.steps)}\n\nAnswer: {self.answer}"


def listed(words: Sequence[str], last: str = "and") -> str:
    """Return words as a list in a sentence: `a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def money(cents: int) -> str:
    """Return an amount in dollars: `$3`, `$3.50`."""
    return f"${cents // 100}" if cents % 100 == 0 else f"${cents // 100}.{cents % 100:02d}"
