"""A length of training, in steps, epochs or tokens."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, PlainSerializer

Unit = Literal["steps", "epochs", "tokens"]

_PATTERN = re.compile(r"\s*([0-9][0-9_.]*(?:e[+-]?\d+)?)\s*([kMGBT]?)\s*([a-z]*)\s*")
_SCALES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_UNITS: dict[str, Unit] = {
    "": "steps",
    "step": "steps",
    "steps": "steps",
    "epoch": "epochs",
    "epochs": "epochs",
    "ep": "epochs",
    "token": "tokens",
    "tokens": "tokens",
    "tok": "tokens",
}


@dataclass(frozen=True)
class Duration:
    """A number of steps, epochs or tokens; a plain number means steps. `Duration.parse("2 epochs")`,
    `Duration.parse("10M tokens")`.
    """

    value: float
    unit: Unit = "steps"

    @classmethod
    def parse(cls, given: Any) -> Duration:
        """Read 500, "500", "0.5 epochs" or "10M tokens"; raises ValueError for anything else."""
        if isinstance(given, Duration):
            return given
        if isinstance(given, bool) or not isinstance(given, (int, float, str)):
            raise ValueError(f"{given!r} is not a duration; write 500, '2 epochs' or '10M tokens'")
        match = _PATTERN.fullmatch(str(given))
        if match is None or match[3] not in _UNITS:
            raise ValueError(f"{given!r} is not a duration; write 500, '2 epochs' or '10M tokens'")
        value = float(match[1].replace("_", "")) * _SCALES[match[2]]
        if not math.isfinite(value):
            raise ValueError(f"{given!r} is not a finite length; give one that a run can reach")
        unit = _UNITS[match[3]]
        if unit == "steps" and 0 < value < 1:  # transformers reads it as a fraction of the run
            raise ValueError(
                f"{given!r} is less than a step, and a fraction of the run cannot be given; write steps, "
                "'0.5 epochs' or '10M tokens'"
            )
        return cls(value, unit)

    def steps(self, *, steps_per_epoch: float, tokens_per_step: float) -> int:
        """The length in whole steps, rounded up.

        Args:
            steps_per_epoch: Steps in one pass over the data.
            tokens_per_step: Training tokens in one step, over all ranks.
        """
        rate = {"steps": 1.0, "epochs": steps_per_epoch, "tokens": 1.0 / tokens_per_step}[self.unit]
        return math.ceil(self.value * rate - 1e-9)

    def __str__(self) -> str:
        # This text is saved with the run, so it keeps every digit.
        number = f"{int(self.value)}" if self.value == int(self.value) else repr(self.value)
        return number if self.unit == "steps" else f"{number} {self.unit}"


def _plain(duration: Duration) -> int | str:
    text = str(duration)
    return int(text) if text.isdigit() else text


def _above_zero(duration: Duration) -> Duration:
    if duration.value <= 0:
        raise ValueError(
            "must be above 0; for never, use none where the setting allows it, or a length beyond the end of "
            "the run"
        )
    return duration


DurationField = Annotated[
    Duration, BeforeValidator(Duration.parse), PlainSerializer(_plain, return_type=int | str)
]
IntervalField = Annotated[DurationField, AfterValidator(_above_zero)]
