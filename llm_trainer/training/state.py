"""Everything a run knows besides weights and optimizer: small, readable, and stored in state.json.

Batches, learning rates, random numbers and the curriculum are functions of these numbers, so restoring them
restores the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, cast

from llm_trainer.errors import CheckpointError
from llm_trainer.training.loss_spikes import SpikeState
from llm_trainer.training.optim.lr_schedule import LRSchedule, LRScheduleState

if TYPE_CHECKING:
    from llm_trainer.run_dir import JSON

# Names in the state.json of earlier versions.
_RENAMED = {"changes": "overrides", "before_operations": "between_steps_pending"}
_RENAMED_IN = {
    "overrides": {"resting": "frozen_with_state"},
    "spikes": {"left_out": "skipped_samples"},
}


@dataclass(frozen=True)
class RunOverrides:
    """What operations have changed of the settings since the run started; None means unchanged.

    Attributes:
        micro_batch_size: Sequences per micro-batch.
        sequences_per_step: Sequences per step over all ranks, so that a resume on another number of ranks
            keeps the step.
        eval_iters: Batches per validation.
        eval_interval: Steps between validations.
        frozen: Names of the parameters that are not trained.
        frozen_with_state: Those of them whose optimizer state is kept.
    """

    micro_batch_size: int | None = None
    sequences_per_step: int | None = None
    eval_iters: int | None = None
    eval_interval: int | None = None
    frozen: list[str] | None = None
    frozen_with_state: list[str] = field(default_factory=list)


@dataclass
class TrainingState:
    """The position of a run and what it depends on.

    Attributes:
        step: Optimizer updates so far.
        samples: Sequences consumed so far, skipped steps included.
        tokens: Token positions consumed so far, skipped steps included.
        seconds: Training time so far, over all starts of the run.
        best_validation_loss: Lowest validation loss so far, in nats per token.
        last_validation_loss: The latest one.
        skipped_in_a_row: Steps in a row that were skipped for a non-finite loss or gradient.
        skipped_steps: All such steps so far.
        precision: Precision in effect.
        compile: Compile mode in effect.
        schedule: The learning-rate schedule, in steps.
        total_steps: Step at which the run ends.
        operations: What operations have changed of the schedule.
        source_tokens: Supervised tokens so far from each corpus of a mixture.
        spikes: State of the loss-spike rule.
        overrides: What operations have changed of the settings.
        between_steps_pending: True if saved before the between-step callbacks ran.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_validation_loss: float | None = None
    last_validation_loss: float | None = None
    skipped_in_a_row: int = 0
    skipped_steps: int = 0
    precision: str | None = None
    compile: str | None = None
    schedule: LRSchedule | None = None
    total_steps: int | None = None
    operations: LRScheduleState = field(default_factory=LRScheduleState)
    source_tokens: dict[str, int] = field(default_factory=dict)
    spikes: SpikeState = field(default_factory=SpikeState)
    overrides: RunOverrides = field(default_factory=RunOverrides)
    between_steps_pending: bool = False

    def to_json(self) -> dict[str, JSON]:
        """Plain values for state.json."""
        return cast("dict[str, JSON]", asdict(self))

    @classmethod
    def from_json(cls, stored: Mapping[str, object]) -> TrainingState:
        """Read what `to_json` wrote; other names in `stored` belong to others and are ignored.

        Raises:
            CheckpointError: If a value does not fit.
        """
        values = {name: value for name, value in stored.items() if name in cls.__dataclass_fields__}
        try:
            if isinstance(values.get("schedule"), Mapping):
                values["schedule"] = LRSchedule(**cast("dict[str, float]", values["schedule"]))  # type: ignore[arg-type]
            if isinstance(values.get("operations"), Mapping):
                values["operations"] = LRScheduleState(**cast("dict[str, float]", values["operations"]))  # type: ignore[arg-type]
            if isinstance(values.get("spikes"), Mapping):
                values["spikes"] = SpikeState.from_json(cast("Mapping[str, object]", values["spikes"]))
            if isinstance(values.get("overrides"), Mapping):
                values["overrides"] = RunOverrides(**cast("dict[str, int]", values["overrides"]))  # type: ignore[arg-type]
            return cls(**values)  # type: ignore[arg-type]
        except TypeError as error:
            raise CheckpointError(
                f"the checkpoint's training state does not fit this version: {error}"
            ) from error


def with_current_names(stored: Mapping[str, JSON]) -> dict[str, JSON]:
    """The contents of a state.json under the names of this version."""
    current = {_RENAMED.get(name, name): value for name, value in stored.items()}
    for name, renamed in _RENAMED_IN.items():
        inner = current.get(name)
        if isinstance(inner, Mapping):
            current[name] = {renamed.get(key, key): value for key, value in inner.items()}
    return current
