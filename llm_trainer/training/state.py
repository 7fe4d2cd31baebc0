"""All that a run knows beside weights and optimizer: small, readable, and whole in the checkpoint's
state.json.

Batches, rates, random numbers and curriculum are functions of these numbers, so restoring them restores the
run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, cast

from llm_trainer.config import CheckpointError
from llm_trainer.training.loss_spikes import SpikeState
from llm_trainer.training.optim.lr_schedule import Schedule, ScheduleState

if TYPE_CHECKING:
    from llm_trainer.run_dir import JSON
    from llm_trainer.training.engines.validation import ValidationResult


@dataclass(frozen=True)
class RunChanges:
    """What operations have changed of the run since its settings were said; None: as said.

    `sequences_per_step` counts all ranks, so that another number of ranks goes on with the same step. `frozen` are the parameters that are
    not trained, and those of them in `resting` have optimizer state that waits.
    """

    micro_batch_size: int | None = None
    sequences_per_step: int | None = None
    eval_iters: int | None = None
    eval_interval: int | None = None
    frozen: list[str] | None = None
    resting: list[str] = field(default_factory=list)


@dataclass
class TrainingState:
    """Where the run stands. `samples` and `tokens` (places in rows) count what was consumed, skipped steps
    included; `source_tokens` are the supervised tokens of each corpus of a mixture. `before_operations`:
    saved when what comes between the steps was still to come.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_validation_loss: float | None = None
    last_validation_loss: float | None = None
    skipped_in_a_row: int = 0
    precision: str | None = None
    compile: str | None = None
    schedule: Schedule | None = None
    total_steps: int | None = None
    operations: ScheduleState = field(default_factory=ScheduleState)
    source_tokens: dict[str, int] = field(default_factory=dict)
    spikes: SpikeState = field(default_factory=SpikeState)
    changes: RunChanges = field(default_factory=RunChanges)
    before_operations: bool = False

    def to_json(self) -> dict[str, JSON]:
        """Plain values for state.json."""
        return cast("dict[str, JSON]", asdict(self))

    @classmethod
    def from_json(cls, stored: Mapping[str, object]) -> TrainingState:
        """Read what `to_json` wrote; names it does not know are left for their owners. Raises CheckpointError
        where a value does not fit.
        """
        names = set(cls.__dataclass_fields__)
        values = {name: value for name, value in stored.items() if name in names}
        try:
            if isinstance(values.get("schedule"), Mapping):
                values["schedule"] = Schedule(**cast("dict[str, float]", values["schedule"]))  # type: ignore[arg-type]
            if isinstance(values.get("operations"), Mapping):
                values["operations"] = ScheduleState(**cast("dict[str, float]", values["operations"]))  # type: ignore[arg-type]
            if isinstance(values.get("spikes"), Mapping):
                values["spikes"] = SpikeState.from_json(cast("Mapping[str, object]", values["spikes"]))
            if isinstance(values.get("changes"), Mapping):
                values["changes"] = RunChanges(**cast("dict[str, int]", values["changes"]))  # type: ignore[arg-type]
            return cls(**values)  # type: ignore[arg-type]
        except TypeError as error:
            raise CheckpointError(
                f"the checkpoint's training state does not fit this version: {error}"
            ) from error


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended. `ended_by`: finished, stopped (a callback), time, preempted or evaluated;
    `exit_status` is for the process.
    """

    ended_by: str
    step: int
    tokens: int
    seconds: float
    loss: float | None
    validation: ValidationResult | None
    best_validation_loss: float | None
    exit_status: int = 0
