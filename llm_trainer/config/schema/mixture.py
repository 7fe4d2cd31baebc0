"""How several corpora are mixed: weights, and stages of a run with weights of their own."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from pydantic import model_validator

from llm_trainer.config.duration import DurationField
from llm_trainer.config.schema.base import Section, setting
from llm_trainer.errors import UsageError


class MixtureStage(Section):
    """One stretch of a run."""

    weights: dict[str, float] = setting(
        dict, "corpus → its share of the tokens, relative to the others; 0 leaves it out"
    )
    until: DurationField | None = setting(
        None,
        "where it ends, counted from the run's beginning; none: with the run",
        unit="steps, epochs or tokens",
    )

    @model_validator(mode="after")
    def _weighs_something(self) -> MixtureStage:
        for name, weight in self.weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise UsageError(f"the weight of {name} is {weight:g}; it must be 0 or more")
        if self.weights and not any(self.weights.values()):
            raise UsageError("all weights of a mixture are 0; give one corpus a weight")
        return self


def check_stages(stages: Sequence[MixtureStage], names: Collection[str], where: str) -> None:
    """Raises UsageError unless every stage weighs exactly the corpora of these names and every stage but the
    last ends.
    """
    if not stages:
        raise UsageError(f"{where}: a mixture needs weights, or stages with weights")
    for number, stage in enumerate(stages, 1):
        unknown, missing = (
            sorted(stage.weights.keys() - set(names)),
            sorted(set(names) - stage.weights.keys()),
        )
        of = f" of stage {number}" if len(stages) > 1 else ""
        if unknown:
            raise UsageError(
                f"{where}: the weights{of} name {', '.join(unknown)}, but the mixture has {', '.join(sorted(names))}"
            )
        if missing:
            raise UsageError(
                f"{where}: the weights{of} do not name {', '.join(missing)}; give 0 to leave a corpus out"
            )
        if (stage.until is None) != (number == len(stages)):
            raise UsageError(
                f"{where}: every stage but the last says `until`, and the last one does not (stage {number})"
            )
