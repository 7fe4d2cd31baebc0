"""Exercises of the domain science: formulas of school physics and chemistry applied to numbers, with units.

Constants are rounded as in school books, and each question states those that it needs.
"""

from __future__ import annotations

from fractions import Fraction
from random import Random

from llm_trainer.data.domains.synthetic.base import Generator, QuestionStepsAnswer

# Standard atomic weights, rounded as school tables do.
ATOMIC_MASSES = {
    "H": "1",
    "C": "12",
    "N": "14",
    "O": "16",
    "Na": "23",
    "Mg": "24",
    "S": "32",
    "Cl": "35.5",
    "K": "39",
    "Ca": "40",
}
_MOLECULES = {
    "water": "H2 O1", "carbon dioxide": "C1 O2", "methane": "C1 H4", "ammonia": "N1 H3",
    "sodium chloride": "Na1 Cl1",
    "glucose": "C6 H12 O6", "sulfuric acid": "H2 S1 O4", "magnesium oxide": "Mg1 O1",
    "calcium carbonate": "Ca1 C1 O3",
    "ethanol": "C2 H6 O1", "nitric acid": "H1 N1 O3", "potassium chloride": "K1 Cl1",
    "sulfur dioxide": "S1 O2", "propane": "C3 H8",
}  # fmt: skip
_DENSITIES = {
    "aluminium": "2.7",
    "iron": "7.9",
    "copper": "9",
    "lead": "11.3",
    "oak": "0.7",
    "ice": "0.9",
    "glass": "2.5",
}


def speed(rng: Random) -> QuestionStepsAnswer:
    """Distance, time or speed at a constant speed."""
    pace, hours = rng.randrange(10, 130, 5), Fraction(rng.randint(3, 16), 2)
    distance = pace * hours
    thing = rng.choice(("A train", "A cyclist", "A ship", "A bus", "A drone"))
    kind = rng.choice(("distance", "time", "speed"))
    if kind == "distance":
        question = f"{thing} moves at a constant {pace} km/h for {_number(hours)} hours. How far does it go?"
        return (
            question,
            [f"Distance is speed times time: {pace} km/h × {_number(hours)} h = {_number(distance)} km."],
            f"{_number(distance)} km",
        )
    if kind == "time":
        question = (
            f"{thing} moves at a constant {pace} km/h. How long does it take for {_number(distance)} km?"
        )
        return (
            question,
            [f"Time is distance over speed: {_number(distance)} km / {pace} km/h = {_number(hours)} h."],
            f"{_number(hours)} h",
        )
    question = f"{thing} covers {_number(distance)} km in {_number(hours)} hours. What is its average speed?"
    return (
        question,
        [f"Speed is distance over time: {_number(distance)} km / {_number(hours)} h = {pace} km/h."],
        f"{pace} km/h",
    )


def free_fall(rng: Random) -> QuestionStepsAnswer:
    """Height and speed after a fall with g = 10 m/s²."""
    seconds = rng.randint(1, 9)
    thing = rng.choice(("stone", "ball", "key", "coin"))
    question = (
        f"A {thing} falls from rest for {seconds} s. How far does it fall and how fast is it then? "
        "Neglect air and use g = 10 m/s²."
    )
    steps = [
        f"The distance is g·t²/2 = 10 × {seconds}² / 2 = {5 * seconds**2} m.",
        f"The speed is g·t = {10 * seconds} m/s.",
    ]
    return question, steps, f"{5 * seconds**2} m, {10 * seconds} m/s"


def newton(rng: Random) -> QuestionStepsAnswer:
    """Force, mass or acceleration."""
    mass, acceleration = rng.randint(2, 90), Fraction(rng.randint(1, 24), 2)
    force = mass * acceleration
    kind = rng.choice(("force", "acceleration", "mass"))
    if kind == "force":
        question = f"What force gives a body of {mass} kg an acceleration of {_number(acceleration)} m/s²?"
        return (
            question,
            [f"F = m·a = {mass} kg × {_number(acceleration)} m/s² = {_number(force)} N."],
            f"{_number(force)} N",
        )
    if kind == "acceleration":
        question = f"A net force of {_number(force)} N acts on a body of {mass} kg. What is its acceleration?"
        steps = [f"a = F/m = {_number(force)} N / {mass} kg = {_number(acceleration)} m/s²."]
        return question, steps, f"{_number(acceleration)} m/s²"
    question = (
        f"A net force of {_number(force)} N accelerates a body at {_number(acceleration)} m/s². What is "
        "its mass?"
    )
    return (
        question,
        [f"m = F/a = {_number(force)} N / {_number(acceleration)} m/s² = {mass} kg."],
        f"{mass} kg",
    )


def ohm(rng: Random) -> QuestionStepsAnswer:
    """Voltage, current, resistance and power."""
    resistance, current = rng.randint(2, 120), Fraction(rng.randint(1, 40), 4)
    voltage = resistance * current
    if rng.random() < 0.5:
        question = (
            f"A resistor of {resistance} Ω carries a current of {_number(current)} A. What is the "
            "voltage across it, and what its power?"
        )
        power = voltage * current
        steps = [
            f"U = R·I = {_number(voltage)} V.",
            f"P = U·I = {_number(voltage)} V × {_number(current)} A = {_number(power)} W.",
        ]
        return question, steps, f"{_number(voltage)} V, {_number(power)} W"
    question = (
        f"A voltage of {_number(voltage)} V drives a current of {_number(current)} A through a wire. "
        "What is its resistance?"
    )
    return (
        question,
        [f"R = U/I = {_number(voltage)} V / {_number(current)} A = {resistance} Ω."],
        f"{resistance} Ω",
    )


def resistors(rng: Random) -> QuestionStepsAnswer:
    """Two resistors in series or in parallel."""
    a, b = rng.randrange(10, 200, 10), rng.randrange(10, 200, 10)
    if rng.random() < 0.5:
        return (
            f"Resistors of {a} Ω and {b} Ω are in series. What is the total resistance?",
            [f"{a} + {b} = {a + b}."],
            f"{a + b} Ω",
        )
    total = Fraction(a * b, a + b)
    question = (
        f"Resistors of {a} Ω and {b} Ω are in parallel. What is the total resistance, as a fraction of "
        "ohms in lowest terms?"
    )
    shown = str(total.numerator) if total.denominator == 1 else f"{total.numerator}/{total.denominator}"
    return question, [f"R = R₁·R₂/(R₁ + R₂) = {a * b}/{a + b} = {shown}."], f"{shown} Ω"


def density(rng: Random) -> QuestionStepsAnswer:
    """Mass of a block from its sides and its density."""
    name, shown = rng.choice(sorted(_DENSITIES.items()))
    sides = [rng.randint(2, 20) for _ in range(3)]
    volume = sides[0] * sides[1] * sides[2]
    mass = volume * Fraction(shown)
    question = (
        f"A block of {name} is {sides[0]} cm long, {sides[1]} cm wide and {sides[2]} cm high. "
        f"What is its mass, if {name} has a density of {shown} g/cm³?"
    )
    steps = [
        f"The volume is {sides[0]} × {sides[1]} × {sides[2]} = {volume} cm³.",
        f"Mass is density times volume: {shown} g/cm³ × {volume} cm³ = {_number(mass)} g.",
    ]
    return question, steps, f"{_number(mass)} g"


def kinetic_energy(rng: Random) -> QuestionStepsAnswer:
    """Kinetic energy of a moving body."""
    mass, pace = rng.randrange(2, 60, 2), rng.randint(2, 30)
    energy = mass * pace * pace // 2
    question = f"What is the kinetic energy of a body of {mass} kg that moves at {pace} m/s?"
    return question, [f"E = m·v²/2 = {mass} × {pace}² / 2 = {energy} J."], f"{energy} J"


def half_life(rng: Random) -> QuestionStepsAnswer:
    """The amount left after some half-lives."""
    halves, years = rng.randint(2, 7), rng.choice((2, 3, 5, 8, 12, 20, 30, 50))
    start = 2**halves * rng.randint(1, 12)
    left = start >> halves
    question = (
        f"A sample holds {start} g of a substance with a half-life of {years} years. How much is left "
        f"after {halves * years} years?"
    )
    chain = " → ".join(str(start >> step) for step in range(halves + 1))
    return (
        question,
        [f"{halves * years} years are {halves} half-lives, and each halves the amount: {chain}."],
        f"{left} g",
    )


def molar_mass(rng: Random) -> QuestionStepsAnswer:
    """Molar mass of a compound, and the mass of some moles of it."""
    name, atoms = rng.choice(sorted(_MOLECULES.items()))
    counts = [
        (
            symbol.rstrip("0123456789"),
            int(symbol.lstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")),
        )
        for symbol in atoms.split()
    ]
    formula = "".join(element + (str(count) if count > 1 else "") for element, count in counts)
    mass = sum((Fraction(ATOMIC_MASSES[element]) * count for element, count in counts), Fraction(0))
    moles = Fraction(rng.randint(1, 16), 2)
    given = ", ".join(f"{element} {ATOMIC_MASSES[element]}" for element, _ in counts)
    question = (
        f"What is the mass of {_number(moles)} mol of {name}, {formula}? Use the atomic masses {given} "
        "(in g/mol)."
    )
    terms = " + ".join(f"{count} × {ATOMIC_MASSES[element]}" for element, count in counts)
    steps = [
        f"The molar mass is {terms} = {_number(mass)} g/mol.",
        f"{_number(moles)} mol × {_number(mass)} g/mol = {_number(moles * mass)} g.",
    ]
    return question, steps, f"{_number(moles * mass)} g"


def temperature(rng: Random) -> QuestionStepsAnswer:
    """Celsius, Fahrenheit and kelvin."""
    celsius = rng.randrange(-40, 200, 5)
    fahrenheit = celsius * 9 // 5 + 32
    kind = rng.choice(("to fahrenheit", "to celsius", "to kelvin"))
    if kind == "to fahrenheit":
        steps = [f"F = C × 9/5 + 32 = {celsius * 9 // 5} + 32 = {fahrenheit}."]
        return f"Convert {celsius} °C to degrees Fahrenheit.", steps, f"{fahrenheit} °F"
    if kind == "to celsius":
        steps = [f"C = (F - 32) × 5/9 = {fahrenheit - 32} × 5/9 = {celsius}."]
        return f"Convert {fahrenheit} °F to degrees Celsius.", steps, f"{celsius} °C"
    return (
        f"Convert {celsius} °C to kelvin, with 0 °C = 273 K.",
        [f"{celsius} + 273 = {celsius + 273}."],
        f"{celsius + 273} K",
    )


def heating(rng: Random) -> QuestionStepsAnswer:
    """The heat that warms water."""
    mass, rise = rng.randint(1, 20), rng.randint(2, 80)
    question = (
        f"How much heat warms {mass} kg of water by {rise} K? The specific heat of water is 4.2 kJ/(kg·K)."
    )
    heat = Fraction("4.2") * mass * rise
    return question, [f"Q = c·m·ΔT = 4.2 × {mass} × {rise} = {_number(heat)} kJ."], f"{_number(heat)} kJ"


def lever(rng: Random) -> QuestionStepsAnswer:
    """Balance of a lever."""
    force, arm = rng.randrange(10, 200, 10), rng.randint(2, 12)
    other_arm = rng.choice([length for length in range(1, 13) if (force * arm) % length == 0])
    balance = force * arm // other_arm
    question = (
        f"A force of {force} N acts on a lever, {arm} cm from its pivot. Which force balances it, "
        f"{other_arm} cm from the pivot on the "
        "other side?"
    )
    steps = [
        f"The moments are equal: F × {other_arm} = {force} × {arm} = {force * arm}.",
        f"So F = {balance} N.",
    ]
    return question, steps, f"{balance} N"


def _number(value: Fraction | int) -> str:
    """A number as decimals; it must have few of them."""
    shown = f"{float(value):.6f}".rstrip("0").rstrip(".")
    assert Fraction(shown) == value, f"{value} has no short decimals"
    return shown


GENERATORS: tuple[Generator, ...] = (
    speed, free_fall, newton, ohm, resistors, density, kinetic_energy, half_life, molar_mass, temperature,
    heating, lever,
)  # fmt: skip
