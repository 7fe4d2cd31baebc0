"""Exercises with worked answers, generated from a seed, for the domains that Python has no text of.

Exercise i of a domain is a function of the domain, the seed and i alone, so any number of exercises can be
generated anywhere in any order. Each generator draws numbers, words and phrasing, and works the answer out
step by step; a test finds each answer in another way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from random import Random

from llm_trainer.data.domains.synthetic import logic, math, reasoning, science
from llm_trainer.data.domains.synthetic.base import Exercise, Generator

_GENERATORS: Mapping[str, Sequence[Generator]] = {
    "math": math.GENERATORS,
    "logic": logic.GENERATORS,
    "reasoning": reasoning.GENERATORS,
    "science": science.GENERATORS,
}


def generators(domain: str) -> Mapping[str, Generator]:
    """Return the generators of a domain's exercises by name."""
    return {generator.__name__: generator for generator in _GENERATORS[domain]}


def generate_exercise(domain: str, index: int, seed: int) -> Exercise:
    """Generate exercise `index` of a domain."""
    rng = Random(f"{domain} {seed} {index}")
    name, generator = rng.choice(sorted(generators(domain).items()))
    question, steps, answer = generator(rng)
    return Exercise(name, question, steps, answer)


def exercises(domain: str, count: int, seed: int) -> Iterator[Exercise]:
    """Yield the first `count` exercises of a domain with different questions."""
    seen: set[str] = set()
    index = 0
    while len(seen) < count:
        exercise = generate_exercise(domain, index, seed)
        index += 1
        if exercise.question not in seen:
            seen.add(exercise.question)
            yield exercise
