"""Exercises of the domain logic: propositions, syllogisms, knights and knaves, orders and sets.

A puzzle is redrawn until a search over all cases finds exactly one that fits, so each puzzle has one answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from llm_trainer.data.domains.synthetic.base import NAMES, Generator, QuestionStepsAnswer, listed


@dataclass(frozen=True)
class _Formula:
    """A proposition in words and as a function of the letters' values."""

    shown: str
    value: Callable[[Mapping[str, bool]], bool]
    parts: tuple[_Formula, ...] = ()

    def inner(self) -> str:
        return f"({self.shown})" if self.parts else self.shown

    def compounds(self) -> Iterator[_Formula]:
        """Yield every compound formula in it, inner ones first."""
        for part in self.parts:
            yield from part.compounds()
        if self.parts:
            yield self


def _formula(rng: Random, letters: str, depth: int) -> _Formula:
    if depth == 0:
        letter = rng.choice(letters)
        return _Formula(letter, lambda values: values[letter])
    kind = rng.choice(("not", "and", "or", "implies", "if and only if"))
    first = _formula(rng, letters, depth - 1)
    if kind == "not":
        return _Formula(f"not {first.inner()}", lambda values: not first.value(values), (first,))
    second = first
    while second.shown == first.shown:
        second = _formula(rng, letters, rng.randint(0, depth - 1))
    connectives: dict[str, Callable[[bool, bool], bool]] = {
        "and": lambda a, b: a and b,
        "or": lambda a, b: a or b,
        "implies": lambda a, b: not a or b,
        "if and only if": lambda a, b: a == b,
    }
    connective = connectives[kind]
    shown = f"{first.inner()} {kind} {second.inner()}"
    return _Formula(
        shown, lambda values: connective(first.value(values), second.value(values)), (first, second)
    )


def _rows(letters: Sequence[str]) -> list[dict[str, bool]]:
    return [
        dict(zip(letters, values, strict=True))
        for values in itertools.product((True, False), repeat=len(letters))
    ]


def _described(values: Mapping[str, bool]) -> str:
    return listed([f"{letter} is {_word(value)}" for letter, value in values.items()])


def _word(value: bool) -> str:
    return "true" if value else "false"


def truth_value(rng: Random) -> QuestionStepsAnswer:
    """The value of a formula for given values."""
    formula = _formula(rng, "pqr", 2)
    values = {letter: rng.random() < 0.5 for letter in "pqr"}
    word = _word(formula.value(values))
    question = rng.choice(
        ("Suppose {}. Is the statement “{}” true or false?", "Given that {}, evaluate “{}”.")
    )
    steps = [f"“{part.shown}” is {_word(part.value(values))}." for part in formula.compounds()]
    return question.format(_described(values), formula.shown), steps, word


def tautology(rng: Random) -> QuestionStepsAnswer:
    """Tautology, contradiction or neither, by the truth table, each about equally often."""
    wanted, answer = rng.choice(("a tautology", "a contradiction", "neither")), ""
    rows = _rows("pq")
    while answer != wanted:
        formula = _formula(rng, "pq", rng.randint(1, 3))
        results = [formula.value(values) for values in rows]
        answer = "a tautology" if all(results) else "neither" if any(results) else "a contradiction"
    steps = [
        f"If {_described(values)}, it is {_word(result)}."
        for values, result in zip(rows, results, strict=True)
    ]
    question = f"Is “{formula.shown}” a tautology, a contradiction, or neither?"
    return question, ["Go through the truth table.", *steps], answer


def equivalence(rng: Random) -> QuestionStepsAnswer:
    """Whether two formulas are equivalent; often by a law, with a counterexample otherwise."""
    one = _formula(rng, "pq", 2)
    other = _rewritten(rng) if rng.random() < 0.4 else (one, _formula(rng, "pq", 2))
    first, second = other
    differs = next((values for values in _rows("pq") if first.value(values) != second.value(values)), None)
    question = f"Are “{first.shown}” and “{second.shown}” logically equivalent?"
    if differs is None:
        return question, ["Both have the same value in each of the four rows of the truth table."], "yes"
    a, b = (_word(formula.value(differs)) for formula in (first, second))
    return question, [f"If {_described(differs)}, the first is {a} and the second is {b}."], "no"


def _rewritten(rng: Random) -> tuple[_Formula, _Formula]:
    """Two formulas, often the two sides of a logical law."""
    p, q = rng.sample(("p", "q"), 2)
    values = {
        "not (p and q)": lambda v: not (v["p"] and v["q"]),
        "(not p) or (not q)": lambda v: not v["p"] or not v["q"],
        "not (p or q)": lambda v: not (v["p"] or v["q"]),
        "(not p) and (not q)": lambda v: not v["p"] and not v["q"],
        f"{p} implies {q}": lambda v: not v[p] or v[q],
        f"(not {q}) implies (not {p})": lambda v: v[q] or not v[p],
        f"(not {p}) or {q}": lambda v: not v[p] or v[q],
        f"{q} implies {p}": lambda v: not v[q] or v[p],
    }
    pairs = [(0, 1), (2, 3), (4, 5), (4, 6), (5, 6), (4, 7), (0, 3)]
    names = list(values)
    one, other = rng.choice(pairs)
    return _Formula(names[one], values[names[one]]), _Formula(names[other], values[names[other]])


_THINGS = (
    "poets",
    "sailors",
    "foxes",
    "robots",
    "dragons",
    "painters",
    "owls",
    "gardeners",
    "wizards",
    "pilots",
    "clerks",
    "bakers",
)
_MOODS = {
    "a": "all {} are {}",
    "e": "no {} are {}",
    "i": "some {} are {}",
    "o": "some {} are not {}",
}


def syllogism(rng: Random) -> QuestionStepsAnswer:
    """Whether a conclusion follows, by checking every way in which the three kinds of things can overlap."""
    things = rng.sample(_THINGS, 3)
    first, second = rng.choice([(0, 1), (1, 0)]), rng.choice([(1, 2), (2, 1)])
    moods = [rng.choice("aeio"), rng.choice("aeio"), rng.choice("aeio")]
    claims = [(moods[0], *first), (moods[1], *second), (moods[2], *rng.choice([(0, 2), (2, 0)]))]
    words = [_MOODS[mood].format(things[a], things[b]) for mood, a, b in claims]
    regions = list(itertools.product((False, True), repeat=3))[1:]
    counterexample = None
    for inhabited in itertools.product((False, True), repeat=len(regions)):
        world = [region for region, lives in zip(regions, inhabited, strict=True) if lives]
        if all(
            any(region[kind] for region in world) for kind in range(3)
        ):  # none of the three kinds is empty
            truths = [_is_true(claim, world) for claim in claims]
            if truths[0] and truths[1] and not truths[2]:
                counterexample = world
                break
    question = (
        f"{words[0].capitalize()}, and {words[1]}. There are things of each kind. Does it follow that "
        f"{words[2]}?"
    )
    if counterexample is None:
        return question, ["Whenever both premises are true, the conclusion is true as well."], "yes"
    shown = [listed([_a(things[kind], region[kind]) for kind in range(3)]) for region in counterexample]
    return (
        question,
        [
            (
                f"No: let there be only things that are {'; things that are '.join(shown)}. Both "
                "premises hold and the conclusion fails."
            )
        ],
        "no",
    )


def _is_true(claim: tuple[str, int, int], world: Sequence[Sequence[bool]]) -> bool:
    mood, a, b = claim
    subjects = [region for region in world if region[a]]
    both = [region for region in subjects if region[b]]
    return {"a": len(both) == len(subjects), "e": not both, "i": bool(both), "o": len(both) < len(subjects)}[
        mood
    ]


def _a(things: str, is_one: bool) -> str:
    return things if is_one else f"not {things}"


def knights_and_knaves(rng: Random) -> QuestionStepsAnswer:
    """Who speaks the truth, redrawn until exactly one assignment fits."""
    while True:
        people = rng.sample(NAMES, rng.choice((2, 3)))
        claims = [_claim(rng, speaker, people) for speaker in people]
        fitting = [
            values
            for values in _rows(people)
            if all(
                values[speaker] == claim.value(values) for speaker, claim in zip(people, claims, strict=True)
            )
        ]
        if len(fitting) == 1:
            break
    statements = " ".join(
        f"{speaker} says: “{claim.shown[0].upper()}{claim.shown[1:]}.”"
        for speaker, claim in zip(people, claims, strict=True)
    )
    question = (
        f"On an island, knights always tell the truth and knaves always lie. You meet {listed(people)}. "
        f"{statements} Who is what?"
    )
    answer = listed([f"{name} is a {_rank(is_knight)}" for name, is_knight in fitting[0].items()])
    steps = ["Try each possibility; a knight's words must be true and a knave's false."]
    for values in _rows(people):
        wrong = next(
            (name for name, claim in zip(people, claims, strict=True) if values[name] != claim.value(values)),
            None,
        )
        case = listed([f"{name} is a {_rank(is_knight)}" for name, is_knight in values.items()])
        if wrong is not None:
            truth = "be true, but they are false" if values[wrong] else "be false, but they are true"
            steps.append(f"If {case}, {wrong}'s words ought to {truth}.")
    return question, [*steps, f"Only one case is left: {answer}."], answer


def _rank(is_knight: bool) -> str:
    return "knight" if is_knight else "knave"


def _claim(rng: Random, speaker: str, people: Sequence[str]) -> _Formula:
    other = rng.choice([name for name in people if name != speaker])
    kind = rng.choice(("is", "same", "both", "either", "count"))
    if kind == "is":
        is_knight = rng.random() < 0.5
        return _Formula(f"{other} is a {_rank(is_knight)}", lambda values: values[other] == is_knight)
    if kind == "same":
        return _Formula(
            f"{other} and I are of the same kind", lambda values: values[other] == values[speaker]
        )
    if kind == "both":
        return _Formula(
            f"{other} and I are both knaves", lambda values: not values[other] and not values[speaker]
        )
    if kind == "either":
        return _Formula(
            f"{other} or I am a knave, or both of us are",
            lambda values: not values[other] or not values[speaker],
        )
    count = rng.randint(1, len(people) - 1)
    return _Formula(
        f"exactly {count} of us {'is a knight' if count == 1 else 'are knights'}",
        lambda values: sum(values.values()) == count,
    )


def ordering(rng: Random) -> QuestionStepsAnswer:
    """The order of a line of people, from clues that determine it; redundant clues are omitted."""
    people = rng.sample(NAMES, rng.choice((3, 4, 5)))
    true_order = tuple(rng.sample(people, len(people)))
    clues = _order_clues(rng, true_order)
    rng.shuffle(clues)
    orders = list(itertools.permutations(people))

    def left(chosen: Sequence[tuple[str, Callable[[Sequence[str]], bool]]]) -> list[tuple[str, ...]]:
        return [order for order in orders if all(test(order) for _, test in chosen)]

    for clue in list(clues):
        without = [other for other in clues if other is not clue]
        if len(left(without)) == 1:
            clues = without
    clue_text = " ".join(words for words, _ in clues)
    question = (
        f"{listed(sorted(people))} stand in a line. {clue_text} In which order do they stand, from "
        "front to back?"
    )
    steps = []
    for number in range(1, len(clues) + 1):
        remaining = left(clues[:number])
        steps.append(
            f"After clue {number}, {len(remaining)} of {len(orders)} orders "
            f"{'are' if len(remaining) > 1 else 'is'} left."
        )
    answer = ", ".join(true_order)
    return question, [*steps, f"It is {answer}."], answer


def _order_clues(rng: Random, order: Sequence[str]) -> list[tuple[str, Callable[[Sequence[str]], bool]]]:
    """True clues about an order, which together determine it."""
    clues: list[tuple[str, Callable[[Sequence[str]], bool]]] = []
    for a, b in itertools.combinations(order, 2):
        words = rng.choice((f"{a} stands somewhere in front of {b}.", f"{b} stands somewhere behind {a}."))
        clues.append((words, lambda line, a=a, b=b: line.index(a) < line.index(b)))  # type: ignore[misc]
    for a, b in itertools.pairwise(order):
        words = f"{b} stands directly behind {a}."
        clues.append((words, lambda line, a=a, b=b: line.index(b) == line.index(a) + 1))  # type: ignore[misc]
    clues.append((f"{order[-1]} is the last in the line.", lambda line, last=order[-1]: line[-1] == last))  # type: ignore[misc]
    not_first = rng.choice(order[1:])
    clues.append((f"{not_first} is not at the front.", lambda line, name=not_first: line[0] != name))  # type: ignore[misc]
    return clues


def sets(rng: Random) -> QuestionStepsAnswer:
    """Union, intersection and difference of finite sets."""
    a, b = (sorted(rng.sample(range(1, 16), rng.randint(3, 7))) for _ in range(2))
    kind, result = rng.choice(
        (
            ("A ∪ B", sorted({*a, *b})),
            ("A ∩ B", sorted({*a} & {*b})),
            ("A \\ B", sorted({*a} - {*b})),
            ("B \\ A", sorted({*b} - {*a})),
        )
    )
    meaning = {
        "∪": "in A or in B or in both",
        "∩": "in both A and B",
        "\\": f"in {kind[0]} and not in {kind[-1]}",
    }[kind[2]]
    answer = _set(result)
    question = f"Let A = {_set(a)} and B = {_set(b)}. What is {kind}?"
    return question, [f"{kind} holds the elements that are {meaning}."], answer


def _set(elements: Sequence[int]) -> str:
    return "{" + ", ".join(map(str, elements)) + "}" if elements else "the empty set"


def two_clubs(rng: Random) -> QuestionStepsAnswer:
    """Inclusion and exclusion."""
    both, only_a, only_b, neither = (
        rng.randint(1, 15),
        rng.randint(1, 20),
        rng.randint(1, 20),
        rng.randint(0, 15),
    )
    a, b, total = only_a + both, only_b + both, only_a + only_b + both + neither
    one, other = rng.sample(("chess", "tennis", "choir", "drama", "swimming", "robotics"), 2)
    question = (
        f"Of {total} pupils, {a} are in the {one} club and {b} in the {other} club; {neither} are in "
        "neither. How many are in both clubs?"
    )
    steps = [
        f"{total} - {neither} = {total - neither} pupils are in at least one club.",
        (
            f"{a} + {b} = {a + b} counts those in both twice, so there are {a + b} - {total - neither} "
            f"= {both} of them."
        ),
    ]
    return question, steps, str(both)


GENERATORS: tuple[Generator, ...] = (
    truth_value,
    tautology,
    equivalence,
    syllogism,
    knights_and_knaves,
    ordering,
    sets,
    two_clubs,
)
