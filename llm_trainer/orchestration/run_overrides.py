"""What operations change of a run beside its model, and the operations that do: rates, batches, validation.

Each is a function from settings to settings, the same for a run that goes on and for one that is only
simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llm_trainer.config.resolve.batch_size import BatchPlan
from llm_trainer.config.schema.scaling_schedule import Operation
from llm_trainer.errors import UsageError
from llm_trainer.training.changes import change_batches, change_rates

if TYPE_CHECKING:
    from llm_trainer.training.trainer import Trainer


@dataclass(frozen=True)
class Settings:
    """What is in effect: the peak rate, sequences of a micro-batch, micro-batches of a rank's step, steps of
    warm-up, batches of a validation (None: all), steps between validations. `restarts` counts how often the
    learning rate's schedule has begun again.
    """

    learning_rate: float
    micro_batch_size: int
    gradient_accumulation_steps: int
    warmup_steps: int
    eval_iters: int | None
    eval_interval: int
    restarts: int = 0

    def __str__(self) -> str:
        batch = f"{self.gradient_accumulation_steps} × {self.micro_batch_size} sequences a rank"
        return f"learning rate {self.learning_rate:g}, {batch}, warm-up {self.warmup_steps}, validation every {self.eval_interval} steps"


def settings_of(trainer: Trainer) -> Settings:
    """What is in effect in a run."""
    state, training = trainer.state, trainer.training
    assert state.schedule is not None
    return Settings(
        learning_rate=training.learning_rate * state.operations.factor,
        micro_batch_size=trainer.batches.micro_batch_size,
        gradient_accumulation_steps=trainer.batches.gradient_accumulation_steps,
        warmup_steps=state.schedule.warmup_steps,
        eval_iters=state.changes.eval_iters or training.eval_iters,
        eval_interval=state.changes.eval_interval or trainer.length.in_steps(training.eval_interval),
    )


def put_into_effect(trainer: Trainer, old: Settings, new: Settings) -> None:
    """Let a run go on with other settings. All ranks call this at a step's edge."""
    restart = new.restarts > old.restarts
    if restart or (new.learning_rate, new.warmup_steps) != (old.learning_rate, old.warmup_steps):
        change_rates(trainer, learning_rate=new.learning_rate, warmup_steps=new.warmup_steps, restart=restart)
    plan = BatchPlan(new.micro_batch_size, new.gradient_accumulation_steps)
    if plan != BatchPlan(old.micro_batch_size, old.gradient_accumulation_steps):
        change_batches(trainer, plan)
    changes = trainer.state.changes
    if new.eval_iters != old.eval_iters:
        changes = replace(changes, eval_iters=new.eval_iters)
    if new.eval_interval != old.eval_interval:
        changes = replace(changes, eval_interval=new.eval_interval)
    trainer.state.changes = changes


_FIELDS = {
    "batch_size": "micro_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "warmup_iters": "warmup_steps",
    "eval_iters": "eval_iters",
    "eval_interval": "eval_interval",
}


def _set(field: str, least: int) -> Callable[[Settings, Operation], Settings]:
    def change(settings: Settings, operation: Operation) -> Settings:
        return replace(settings, **{field: max(least, int(operation.value))})

    return change


def _multiply(field: str, least: int) -> Callable[[Settings, Operation], Settings]:
    def change(settings: Settings, operation: Operation) -> Settings:
        present = getattr(settings, field)
        if present is None:
            raise UsageError(
                f"there is nothing to multiply: {field} is not set; take set_{field} with a number"
            )
        return replace(settings, **{field: max(least, round(present * operation.value))})

    return change


CHANGES: Mapping[str, Callable[[Settings, Operation], Settings]] = {
    "set_lr": lambda settings, operation: replace(settings, learning_rate=float(operation.value)),
    "change_lr": lambda settings, operation: replace(
        settings, learning_rate=settings.learning_rate * operation.value
    ),
    "reset_lr_schedule": lambda settings, operation: replace(settings, restarts=settings.restarts + 1),
    **{f"set_{name}": _set(field, field != "warmup_steps") for name, field in _FIELDS.items()},
    **{f"change_{name}": _multiply(field, field != "warmup_steps") for name, field in _FIELDS.items()},
}
"""Operation → settings after it."""
