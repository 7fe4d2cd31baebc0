"""Exercises of the domain reasoning: word problems of several small steps."""

from __future__ import annotations

from datetime import date, timedelta
from fractions import Fraction
from random import Random

from llm_trainer.data.domains.synthetic.base import NAMES, Generator, QuestionStepsAnswer, listed, money

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November", "December",
)  # fmt: skip
_GOODS = ("notebook", "mug", "plant", "scarf", "poster", "kite", "puzzle", "lantern", "basket", "chess set")


def shopping(rng: Random) -> QuestionStepsAnswer:
    """Several things, a discount, and the change."""
    name, (one, other) = rng.choice(NAMES), rng.sample(_GOODS, 2)
    prices = [rng.randrange(100, 2000, 50) for _ in range(2)]
    counts = [rng.randint(1, 6) for _ in range(2)]
    parts = [price * count for price, count in zip(prices, counts, strict=True)]
    total, percent = sum(parts), rng.choice((0, 10, 20, 50))
    to_pay = total - total * percent // 100
    note = (to_pay // 2000 + 1) * 2000
    things = listed(
        [
            f"{count} {thing}{'s' if count > 1 else ''} at {money(price)} each"
            for count, thing, price in zip(counts, (one, other), prices, strict=True)
        ]
    )
    offer = f" The shop takes {percent}% off the bill." if percent else ""
    question = f"{name} buys {things}.{offer} How much change does {name} get from {money(note)}?"
    steps = [f"The things cost {money(parts[0])} + {money(parts[1])} = {money(total)}."]
    if percent:
        steps.append(f"{percent}% of that is {money(total - to_pay)}, so {money(to_pay)} is to be paid.")
    return (
        question,
        [*steps, f"The change is {money(note)} - {money(to_pay)} = {money(note - to_pay)}."],
        money(note - to_pay),
    )


def ages(rng: Random) -> QuestionStepsAnswer:
    """Ages now, from how they compare with each other."""
    first, second, third = rng.sample(NAMES, 3)
    age, older, times = rng.randint(3, 15), rng.randint(1, 9), rng.randint(2, 4)
    b, c, later = age + older, age * times, rng.randint(2, 12)
    question = (
        f"{first} is {age} years old. {second} is {older} year{'s' if older > 1 else ''} older than "
        f"{first}, and {third} is "
        f"{times} times as old as {first}. How old will the three be together in {later} years?"
    )
    together = age + b + c
    steps = [
        f"{second} is {age} + {older} = {b}, {third} is {times} × {age} = {c}.",
        f"Together they are {age} + {b} + {c} = {together}.",
        f"In {later} years each is {later} older: {together} + 3 × {later} = {together + 3 * later}.",
    ]
    return question, steps, str(together + 3 * later)


def timetable(rng: Random) -> QuestionStepsAnswer:
    """A journey with a change of trains."""
    start = rng.randrange(5 * 60, 18 * 60, 5)
    legs = [rng.randrange(15, 170, 5), rng.randrange(5, 55, 5), rng.randrange(20, 200, 5)]
    arrival, change, end = start + legs[0], start + legs[0] + legs[1], start + sum(legs)
    question = (
        f"A train leaves at {_clock(start)} and rides for {_span(legs[0])}. After a wait of "
        f"{_span(legs[1])} another train goes on for "
        f"{_span(legs[2])}. When does it arrive, and how long is the whole journey?"
    )
    steps = [
        f"{_clock(start)} and {_span(legs[0])} is {_clock(arrival)}.",
        f"The second train leaves at {_clock(change)} and arrives {_span(legs[2])} later, at {_clock(end)}.",
        f"From {_clock(start)} to {_clock(end)} it takes {_span(sum(legs))}.",
    ]
    return question, steps, f"at {_clock(end)}, after {_span(sum(legs))}"


def weekday(rng: Random) -> QuestionStepsAnswer:
    """The day of the week some days after another."""
    today, days = rng.randrange(7), rng.randint(8, 400)
    back = rng.random() < 0.4
    weeks, rest = divmod(days, 7)
    result = (today - days) % 7 if back else (today + days) % 7
    question = (
        f"Today is {_DAYS[today]}. Which day of the week {'was it' if back else 'will it be'} {days} "
        f"days {'ago' if back else 'from now'}?"
    )
    steps = [
        (
            f"{days} days are {weeks} weeks and {rest} day{'' if rest == 1 else 's'}; whole weeks "
            "change nothing."
        ),
        (
            f"{rest} day{'' if rest == 1 else 's'} {'before' if back else 'after'} {_DAYS[today]} is "
            f"{_DAYS[result]}."
        ),
    ]
    return question, steps, _DAYS[result]


def dates(rng: Random) -> QuestionStepsAnswer:
    """The date some days after another, across the end of a month."""
    start = date(rng.randint(2001, 2031), rng.randint(1, 12), rng.randint(1, 28))
    days = rng.randint(10, 75)
    end, steps, at, left = start + timedelta(days), [], start, days
    while (at + timedelta(left)).month != at.month or (at + timedelta(left)).year != at.year:
        next_month = (at.replace(day=28) + timedelta(4)).replace(day=1)
        used = (next_month - at).days
        steps.append(f"{used} days after {_date(at)} is {_date(next_month)}; {left - used} are left.")
        at, left = next_month, left - used
    if left:
        steps.append(f"{left} days after {_date(at)} is {_date(end)}.")
    return f"Which date is {days} days after {_date(start)}?", steps, _date(end)


def swaps(rng: Random) -> QuestionStepsAnswer:
    """Who has what after some exchanges."""
    people, things = rng.sample(NAMES, 3), rng.sample(_GOODS, 3)
    held = dict(zip(people, things, strict=True))
    question = f"{listed([f'{name} has a {thing}' for name, thing in held.items()])}."
    steps = []
    for _ in range(rng.randint(2, 5)):
        one, other = rng.sample(people, 2)
        held[one], held[other] = held[other], held[one]
        question += rng.choice(
            (f" {one} and {other} swap what they hold.", f" Then {one} trades with {other}.")
        )
        steps.append(f"Now {listed([f'{name} has the {thing}' for name, thing in held.items()])}.")
    asked = rng.choice(people)
    if rng.random() < 0.5:
        return f"{question} What does {asked} have in the end?", steps, f"the {held[asked]}"
    return f"{question} Who has the {held[asked]} in the end?", steps, asked


def walk(rng: Random) -> QuestionStepsAnswer:
    """How far from the start a walk on a grid ends."""
    x = y = 0
    moves, steps = [], []
    for _ in range(rng.randint(3, 6)):
        way, (dx, dy) = rng.choice(
            (("north", (0, 1)), ("south", (0, -1)), ("east", (1, 0)), ("west", (-1, 0)))
        )
        length = rng.randint(1, 9)
        x, y = x + dx * length, y + dy * length
        moves.append(f"{length} block{'s' if length > 1 else ''} {way}")
        steps.append(f"After {moves[-1]}: {_position(x, y)}.")
    name = rng.choice(NAMES)
    question = (
        f"{name} walks {', then '.join(moves)}. How many blocks from the start is that, walking along "
        "the streets, and in which direction?"
    )
    distance = abs(x) + abs(y)
    return (
        question,
        steps,
        f"{distance} block{'' if distance == 1 else 's'}: {_position(x, y)}"
        if distance
        else "0 blocks: at the start",
    )


def working_together(rng: Random) -> QuestionStepsAnswer:
    """Rates that add up."""
    one, other = rng.sample(NAMES, 2)
    a, b = rng.choice(
        [(a, b) for a in range(2, 31) for b in range(2, 31) if a != b and (a * b) % (a + b) == 0]
    )
    work = rng.choice(
        ("paint a fence", "fold the letters", "weed the garden", "sort the books", "fill a pool")
    )
    together = Fraction(a * b, a + b)
    question = f"{one} needs {a} hours to {work}, {other} needs {b} hours. How long do they need together?"
    rate = Fraction(1, a) + Fraction(1, b)
    steps = [
        (
            f"In an hour {one} does 1/{a} of the work and {other} 1/{b}, together "
            f"{rate.numerator}/{rate.denominator}."
        ),
        f"So they need {together} hours.",
    ]
    return question, steps, f"{together} hours"


def better_offer(rng: Random) -> QuestionStepsAnswer:
    """Which of two packs is cheaper by weight."""
    thing = rng.choice(("rice", "flour", "coffee", "nuts", "oats", "lentils"))
    weights = rng.sample((200, 250, 400, 500, 750, 1000, 1500), 2)
    prices = [rng.randrange(100, 1500, 10) for _ in range(2)]
    rates = [Fraction(price * 1000, weight) for price, weight in zip(prices, weights, strict=True)]
    while abs(rates[0] - rates[1]) < 2:  # cents: a difference that is visible after rounding
        prices[1] += 10
        rates[1] = Fraction(prices[1] * 1000, weights[1])
    question = (
        f"Shop A sells {weights[0]} g of {thing} for {money(prices[0])}, shop B sells {weights[1]} "
        f"g for {money(prices[1])}. "
        "Where is a kilogram cheaper?"
    )
    steps = [
        f"In shop {shop} a kilogram costs {_cents(rate)}." for shop, rate in zip("AB", rates, strict=True)
    ]
    answer = "shop A" if rates[0] < rates[1] else "shop B"
    return question, [*steps, f"It is cheaper in {answer}."], answer


def sharing(rng: Random) -> QuestionStepsAnswer:
    """Things divided among friends, some of which are given away."""
    people, each, left = rng.randint(2, 9), rng.randint(3, 20), rng.randint(0, 8)
    left = min(left, people - 1)
    total = people * each + left
    thing = rng.choice(("marbles", "stickers", "cards", "shells", "sweets", "beads"))
    name, given = rng.choice(NAMES), rng.randint(1, each - 1)
    question = (
        f"{people} friends, {name} among them, share {total} {thing} equally, as far as that goes. "
        f"{name} then gives {given} away. "
        f"How many {thing} does {name} have, and how many were left over when they shared?"
    )
    steps = [
        f"{total} = {people} × {each} + {left}, so each gets {each} and {left} remain.",
        f"{name} keeps {each} - {given} = {each - given}.",
    ]
    return question, steps, f"{each - given}, and {left} were left over"


def _clock(minutes: int) -> str:
    return f"{minutes // 60 % 24:02d}:{minutes % 60:02d}"


def _span(minutes: int) -> str:
    hours, rest = divmod(minutes, 60)
    parts = [f"{hours} h"] if hours else []
    return " ".join([*parts, f"{rest} min"] if rest or not parts else parts)


def _date(day: date) -> str:
    return f"{day.day} {_MONTHS[day.month - 1]} {day.year}"


def _position(x: int, y: int) -> str:
    parts = [f"{abs(y)} {'north' if y > 0 else 'south'}"] if y else []
    parts += [f"{abs(x)} {'east' if x > 0 else 'west'}"] if x else []
    return " and ".join(parts) or "at the start"


def _cents(rate: Fraction) -> str:
    return money(int(rate)) if rate.denominator == 1 else f"about {money(round(rate))}"


GENERATORS: tuple[Generator, ...] = (
    shopping,
    ages,
    timetable,
    weekday,
    dates,
    swaps,
    walk,
    working_together,
    better_offer,
    sharing,
)
