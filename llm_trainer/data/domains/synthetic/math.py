"""Exercises of the domain math: arithmetic, number theory, algebra, calculus, counting and geometry."""

from __future__ import annotations

import math
from fractions import Fraction
from random import Random

from llm_trainer.data.domains.synthetic.base import NAMES, Generator, QuestionStepsAnswer, money


def sum_of_products(rng: Random) -> QuestionStepsAnswer:
    """a × b ± c × d."""
    a, b, c, d = (rng.randint(2, 60) for _ in range(4))
    sign = rng.choice("+-")
    result = a * b + c * d if sign == "+" else a * b - c * d
    question = rng.choice(("Compute {}.", "What is {}?", "Work out the value of {}.")).format(
        f"{a} × {b} {sign} {c} × {d}"
    )
    steps = [
        f"Multiplication comes first: {a} × {b} = {a * b} and {c} × {d} = {c * d}.",
        f"Then {a * b} {sign} {c * d} = {result}.",
    ]
    return question, steps, str(result)


def long_division(rng: Random) -> QuestionStepsAnswer:
    """Quotient and remainder."""
    divisor, dividend = rng.randint(3, 48), rng.randint(100, 9999)
    quotient, remainder = divmod(dividend, divisor)
    question = rng.choice(
        (
            "Divide {} by {}. What are the quotient and the remainder?",
            "Find quotient and remainder of {} divided by {}.",
        )
    )
    steps = [
        (
            f"{divisor} × {quotient} = {divisor * quotient}, and {divisor * (quotient + 1)} is already "
            f"more than {dividend}."
        ),
        f"So the quotient is {quotient}, and {dividend} - {divisor * quotient} = {remainder} is left.",
    ]
    return question.format(dividend, divisor), steps, f"quotient {quotient}, remainder {remainder}"


def fractions(rng: Random) -> QuestionStepsAnswer:
    """Sum, difference or product of two fractions."""
    one, other = (Fraction(rng.randint(1, 11), rng.randint(2, 12)) for _ in range(2))
    sign = rng.choice("+-×")
    result = one + other if sign == "+" else one - other if sign == "-" else one * other
    shown = f"{_fraction(one)} {sign} {_fraction(other)}"
    question = rng.choice(("Calculate {} and simplify.", "Write {} as one fraction in lowest terms.")).format(
        shown
    )
    if sign == "×":
        top, bottom = one.numerator * other.numerator, one.denominator * other.denominator
        steps = [f"Multiply numerators and denominators: {top}/{bottom}."]
    else:
        common = math.lcm(one.denominator, other.denominator)
        tops = [part.numerator * common // part.denominator for part in (one, other)]
        top = tops[0] + tops[1] if sign == "+" else tops[0] - tops[1]
        steps = [
            (
                f"The common denominator is {common}: {tops[0]}/{common} {sign} {tops[1]}/{common} = "
                f"{top}/{common}."
            )
        ]
    return question, [*steps, f"In lowest terms that is {_fraction(result)}."], _fraction(result)


def percentage(rng: Random) -> QuestionStepsAnswer:
    """A price that rises or falls by a percentage."""
    percent, price = rng.choice((5, 10, 12, 15, 20, 25, 30, 40, 60, 75)), rng.randrange(400, 40000, 100)
    thing = rng.choice(("coat", "bicycle", "lamp", "train ticket", "telescope", "guitar", "desk", "camera"))
    rises = rng.random() < 0.5
    change = price * percent // 100
    result = price + change if rises else price - change
    how = "rises" if rises else "is reduced"
    question = f"A {thing} costs {money(price)}. Its price {how} by {percent}%. What is the new price?"
    steps = [
        f"{percent}% of {money(price)} is {money(change)}.",
        f"The new price is {money(price)} {'+' if rises else '-'} {money(change)} = {money(result)}.",
    ]
    return question, steps, money(result)


def common_divisor(rng: Random) -> QuestionStepsAnswer:
    """Greatest common divisor by Euclid's algorithm, and the least common multiple from it."""
    shared = rng.randint(2, 24)
    a, b = shared * rng.randint(2, 30), shared * rng.randint(2, 30)
    big, small, steps = max(a, b), min(a, b), []
    while small:
        steps.append(f"{big} = {small} × {big // small} + {big % small}.")
        big, small = small, big % small
    steps.append(
        f"The last remainder that is not 0 is {big}, the greatest common divisor."
        if len(steps) > 1
        else f"So {big} divides both."
    )
    if rng.random() < 0.5:
        return f"Find the greatest common divisor of {a} and {b} with Euclid's algorithm.", steps, str(big)
    multiple = a * b // big
    steps.append(f"The least common multiple is {a} × {b} / {big} = {multiple}.")
    return f"Find the least common multiple of {a} and {b}.", steps, str(multiple)


def factorization(rng: Random) -> QuestionStepsAnswer:
    """Prime factors."""
    factors = sorted(rng.choice((2, 2, 3, 3, 5, 7, 11, 13, 17, 19, 23)) for _ in range(rng.randint(2, 5)))
    number, steps, left = math.prod(factors), [], math.prod(factors)
    for factor in factors:
        steps.append(f"{left} = {factor} × {left // factor}.")
        left //= factor
    answer = " × ".join(map(str, factors))
    question = rng.choice(
        ("Write {} as a product of primes.", "What is the prime factorization of {}?")
    ).format(number)
    return question, [*steps, f"So {number} = {answer}."], answer


def linear_equation(rng: Random) -> QuestionStepsAnswer:
    """a·x + b = c·x + d with a whole solution."""
    x, a, c = rng.randint(-12, 12), rng.randint(2, 15), rng.randint(-9, 9)
    c = c if c != a else c - 1
    b = rng.randint(-30, 30)
    d = (a - c) * x + b
    name = rng.choice("xyztn")
    left, right = _sum(f"{a}{name}", b), _sum(_times(c, name), d)
    question = rng.choice(("Solve {} = {} for {}.", "Which number satisfies {} = {}? Find {}.")).format(
        left, right, name
    )
    steps = [
        (
            f"Bring the terms with {name} to the left and the numbers to the right: "
            f"{_times(a - c, name)} = {d - b}."
        ),
        f"Divide by {a - c}: {name} = {x}." if a - c != 1 else f"So {name} = {x}.",
    ]
    return question, steps, f"{name} = {x}"


def quadratic_equation(rng: Random) -> QuestionStepsAnswer:
    """x² + b·x + c = 0 with whole roots."""
    one, other = sorted(rng.randint(-12, 12) for _ in range(2))
    b, c = -(one + other), one * other
    equation = f"x² {_signed(b, 'x')}{_signed(c, '')}".strip() + " = 0"
    root = abs(one - other)
    steps = [
        (
            f"The discriminant is {_in_brackets(b)}² - 4 × {_in_brackets(c)} = {b * b - 4 * c}, whose "
            f"square root is {root}."
        ),
        f"So x = ({-b} - {root})/2 = {one} or x = ({-b} + {root})/2 = {other}."
        if root
        else f"So x = {-b}/2 = {one}, a double root.",
    ]
    answer = f"x = {one}" if one == other else f"x = {one} or x = {other}"
    return rng.choice(("Solve {}.", "Find all solutions of {}.")).format(equation), steps, answer


def two_unknowns(rng: Random) -> QuestionStepsAnswer:
    """A system of two linear equations, as a purchase."""
    first, second = rng.sample(
        ("apple", "pear", "pencil", "stamp", "candle", "ticket", "postcard", "muffin"), 2
    )
    x, y = rng.randrange(20, 400, 5), rng.randrange(20, 400, 5)
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    c, d = a, b + rng.randint(1, 5)
    name, friend = rng.sample(NAMES, 2)
    question = (
        f"{name} pays {money(a * x + b * y)} for {a} {first}s and {b} {second}s. {friend} pays "
        f"{money(c * x + d * y)} for {c} {first}s and "
        f"{d} {second}s. What does one {first} cost, and what one {second}?"
    )
    extra = (d - b) * y
    steps = [
        (
            f"{friend} buys as many {first}s and {d - b} more {second}{'s' if d - b > 1 else ''}, and "
            f"pays {money(extra)} more."
        ),
        f"So one {second} costs {money(y)}.",
        (
            f"{a} {first}s cost {money(a * x + b * y)} - {money(b * y)} = {money(a * x)}, so one costs "
            f"{money(x)}."
        ),
    ]
    return question, steps, f"one {first} costs {money(x)}, one {second} {money(y)}"


def arithmetic_sequence(rng: Random) -> QuestionStepsAnswer:
    """A term, or the sum, of an arithmetic sequence."""
    start, step, n = (
        rng.randint(-20, 40),
        rng.choice((-9, -7, -4, -3, 2, 3, 4, 5, 6, 7, 8, 11)),
        rng.randint(8, 60),
    )
    shown = ", ".join(str(start + i * step) for i in range(4)) + ", …"
    term = start + (n - 1) * step
    steps = [
        f"Each term is {step} more than the one before."
        if step > 0
        else f"Each term is {-step} less than the one before."
    ]
    steps.append(f"Term {n} is {start} + {n - 1} × {_in_brackets(step)} = {term}.")
    if rng.random() < 0.5:
        return f"What is term number {n} of the sequence {shown}?", steps, str(term)
    total = n * (start + term) // 2
    steps.append(f"The sum is {n} × ({start} + {_in_brackets(term)})/2 = {total}.")
    return f"What is the sum of the first {n} terms of the sequence {shown}?", steps, str(total)


def derivative(rng: Random) -> QuestionStepsAnswer:
    """Derivative of a polynomial, and its value at a point."""
    coefficients = {power: rng.randint(-9, 9) for power in range(rng.randint(2, 4), -1, -1)}
    coefficients[max(coefficients)] = rng.randint(1, 9)
    derived = {power - 1: power * factor for power, factor in coefficients.items() if power}
    at = rng.randint(-3, 4)
    value = sum(factor * at**power for power, factor in derived.items())
    question = f"Let f(x) = {_polynomial(coefficients)}. Find f'(x) and f'({at})."
    steps = [
        "The derivative of c·xⁿ is c·n·xⁿ⁻¹, term by term.",
        f"f'(x) = {_polynomial(derived)}.",
        f"At x = {at} that is {value}.",
    ]
    return question, steps, f"f'(x) = {_polynomial(derived)}, f'({at}) = {value}"


def remainder_of_power(rng: Random) -> QuestionStepsAnswer:
    """a^n modulo m by repeated squaring."""
    base, power, modulus = rng.randint(2, 19), rng.randint(5, 40), rng.randint(5, 30)
    question = rng.choice(("What is the remainder of {}^{} divided by {}?", "Compute {}^{} modulo {}."))
    steps, square, result, bits = [], base % modulus, 1, []
    for bit, digit in enumerate(reversed(f"{power:b}")):
        if bit:
            steps.append(
                f"{base}^{2**bit} leaves {square}² = {square * square}, that is {square * square % modulus}."
            )
            square = square * square % modulus
        if digit == "1":
            bits.append(2**bit)
            result = result * square % modulus
    steps.insert(
        0, f"Square repeatedly, keeping remainders modulo {modulus}: {base}^1 leaves {base % modulus}."
    )
    steps.append(
        f"{power} = {' + '.join(map(str, bits))}, and the product of these remainders leaves {result}."
    )
    return question.format(base, power, modulus), steps, str(result)


def committee(rng: Random) -> QuestionStepsAnswer:
    """Combinations, from one group or from two."""
    people, chosen = rng.randint(5, 14), rng.randint(2, 4)
    count = math.comb(people, chosen)
    way = f"{' × '.join(str(people - i) for i in range(chosen))} / {math.factorial(chosen)}"
    if rng.random() < 0.5:
        question = f"In how many ways can a committee of {chosen} be chosen from {people} people?"
        return question, [f"Order does not matter, so the number is {way} = {count}."], str(count)
    others, taken = rng.randint(4, 10), rng.randint(1, 3)
    second = math.comb(others, taken)
    question = (
        f"A jury has {chosen} of {people} teachers and {taken} of {others} pupils. How many such juries "
        "are there?"
    )
    steps = [
        f"There are {way} = {count} choices of teachers and {second} of pupils.",
        f"Each goes with each: {count} × {second} = {count * second}.",
    ]
    return question, steps, str(count * second)


def drawing_balls(rng: Random) -> QuestionStepsAnswer:
    """Two balls, drawn without replacement."""
    one, other = rng.sample(("red", "blue", "green", "white", "black", "yellow"), 2)
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    total, result = a + b, Fraction(a, a + b) * Fraction(a - 1, a + b - 1)
    question = (
        f"An urn holds {a} {one} and {b} {other} balls. Two are drawn at random, without putting "
        "the first back. "
        f"What is the probability that both are {one}?"
    )
    steps = [
        f"The first is {one} with probability {a}/{total}, the second then with {a - 1}/{total - 1}.",
        f"The product is {a * (a - 1)}/{total * (total - 1)} = {_fraction(result)}.",
    ]
    return question, steps, _fraction(result)


def right_triangle(rng: Random) -> QuestionStepsAnswer:
    """A side of a right triangle whose sides are whole numbers, or its area."""
    m, n = rng.choice([(m, n) for m in range(2, 7) for n in range(1, m) if math.gcd(m, n) == 1])
    times = rng.randint(1, 6)
    a, b, c = times * (m * m - n * n), times * 2 * m * n, times * (m * m + n * n)
    unit = rng.choice(("cm", "m", "mm"))
    if rng.random() < 0.5:
        question = (
            f"The legs of a right triangle are {a} {unit} and {b} {unit} long. How long is the "
            "hypotenuse, and what is the area?"
        )
        steps = [
            f"By the theorem of Pythagoras c² = {a}² + {b}² = {c * c}, so c = {c} {unit}.",
            f"The area is {a} × {b} / 2 = {a * b // 2} {unit}².",
        ]
        return question, steps, f"hypotenuse {c} {unit}, area {a * b // 2} {unit}²"
    question = (
        f"A right triangle has a hypotenuse of {c} {unit} and one leg of {a} {unit}. How long is the "
        "other leg?"
    )
    return (
        question,
        [f"The other leg squared is {c}² - {a}² = {b * b}.", f"So it is {b} {unit} long."],
        f"{b} {unit}",
    )


def _fraction(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"{value.numerator}/{value.denominator}"


def _in_brackets(number: int) -> str:
    return f"({number})" if number < 0 else str(number)


def _times(factor: int, name: str) -> str:
    return {0: "0", 1: name, -1: f"-{name}"}.get(factor, f"{factor}{name}")


def _sum(first: str, second: int) -> str:
    if second == 0:
        return first
    if first == "0":
        return str(second)
    return f"{first} {'+' if second > 0 else '-'} {abs(second)}"


def _signed(factor: int, name: str) -> str:
    """A term with its sign: `+ 3x `, `- x `, or nothing; it ends with a space."""
    if factor == 0:
        return ""
    size = "" if name and abs(factor) == 1 else str(abs(factor))
    return f"{'+' if factor > 0 else '-'} {size}{name} "


def _polynomial(coefficients: dict[int, int]) -> str:
    shown = ""
    for power, factor in sorted(coefficients.items(), reverse=True):
        name = "" if power == 0 else "x" if power == 1 else f"x^{power}"
        shown += _signed(factor, name)
    shown = shown.strip() or "0"
    return (
        shown.removeprefix("+ ")
        if shown.startswith("+")
        else f"-{shown[2:]}"
        if shown.startswith("- ")
        else shown
    )


GENERATORS: tuple[Generator, ...] = (
    sum_of_products, long_division, fractions, percentage, common_divisor, factorization, linear_equation,
    quadratic_equation,
    two_unknowns, arithmetic_sequence, derivative, remainder_of_power, committee, drawing_balls,
    right_triangle,
)  # fmt: skip
