"""How several corpora are mixed: sampling weights, which may differ between the stages of a run."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from pydantic import model_validator

from llm_trainer.config.duration import DurationField
from llm_trainer.config.schema.base import Section, setting
from llm_trainer.errors import UsageError


class MixtureStage(Section):
    """One stage of a run, with its mixture weights."""

    weights: dict[str, float] = setting(
        dict, "Sampling weight of each corpus, relative to the others. 0: the corpus is left out."
    )
    until: DurationField | None = setting(
        None,
        "End of the stage, counted from the start of the run. Unset: the end of the run.",
        unit="steps, epochs or tokens",
    )

    @model_validator(mode="after")
    def _check_weights(self) -> MixtureStage:
        for name, weight in self.weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise UsageError(f"invalid mixture weight of {name}: {weight:g} (must be 0 or more)")
        if self.weights and not any(self.weights.values()):
            raise UsageError("all weights of the mixture are 0; give at least one corpus a weight above 0")
        return self


def check_stages(stages: Sequence[MixtureStage], names: Collection[str], where: str) -> None:
    """Check the stages of a mixture.

    Args:
        stages: The stages, in order.
        names: The corpora of the mixture.
        where: What the error messages call the mixture.

    Raises:
        UsageError: A stage does not weigh exactly these corpora, or a stage other than the last has no end.
    """
    if not stages:
        raise UsageError(f"{where}: a mixture needs weights, or stages with weights")
    for number, stage in enumerate(stages, 1):
        unknown, missing = (
            sorted(stage.weights.keys() - set(names)),
            sorted(set(names) - stage.weights.keys()),
        )
        of_stage = f" of stage {number}" if len(stages) > 1 else ""
        if unknown:
            raise UsageError(
                f"{where}: the weights{of_stage} name {', '.join(unknown)}, but the mixture has "
                f"{', '.join(sorted(names))}"
            )
        if missing:
            raise UsageError(
                f"{where}: the weights{of_stage} do not name {', '.join(missing)}; give a corpus 0 to leave "
                "it out"
            )
        if (stage.until is None) != (number == len(stages)):
            raise UsageError(
                f"{where}: every stage except the last needs `until`, and the last one must not have it "
                f"(stage {number})"
            )
