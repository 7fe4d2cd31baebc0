"""What operations change of a run besides its model, and the operations that do: rates, batches, validation.

Each operation is a function from settings to settings, the same for a run that trains and for a dry run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from llm_trainer.config.resolve.batch_size import BatchPlan
from llm_trainer.config.schema.scaling_schedule import Operation
from llm_trainer.errors import UsageError
from llm_trainer.training.engines.out_of_memory import OutOfMemory
from llm_trainer.training.run import TrainingRun


@dataclass(frozen=True)
class RunSettings:
    """The settings in effect.

    Attributes:
        learning_rate: The peak learning rate.
        micro_batch_size: Sequences per micro-batch.
        gradient_accumulation_steps: Micro-batches per step and rank.
        warmup_steps: Steps of warm-up.
        eval_iters: Batches per validation; None means all.
        eval_interval: Steps between validations.
        restarts: How often the learning-rate schedule has started again.
    """

    learning_rate: float
    micro_batch_size: int
    gradient_accumulation_steps: int
    warmup_steps: int
    eval_iters: int | None
    eval_interval: int
    restarts: int = 0

    @classmethod
    def of_run(cls, run: TrainingRun) -> RunSettings:
        """The settings in effect in a run."""
        assert run.state.schedule is not None
        return cls(
            learning_rate=run.training.learning_rate * run.state.operations.factor,
            micro_batch_size=run.batches.micro_batch_size,
            gradient_accumulation_steps=run.batches.gradient_accumulation_steps,
            warmup_steps=run.state.schedule.warmup_steps,
            eval_iters=run.eval_iters,
            eval_interval=run.eval_interval,
        )

    @property
    def batches(self) -> BatchPlan:
        """The division of a rank's part of a step."""
        return BatchPlan(self.micro_batch_size, self.gradient_accumulation_steps)

    def __str__(self) -> str:
        batch = f"{self.gradient_accumulation_steps} × {self.micro_batch_size} sequences per rank"
        return (
            f"learning rate {self.learning_rate:g}, {batch}, warm-up {self.warmup_steps}, "
            f"validation every {self.eval_interval} steps"
        )


def apply_settings(run: TrainingRun, old: RunSettings, new: RunSettings) -> None:
    """Continue a run with other settings. All ranks call this between two steps.

    Args:
        run: The run.
        old: The settings in effect.
        new: The settings to put into effect.

    Raises:
        UsageError: If the ranks cannot run a step divided so.
    """
    restart = new.restarts > old.restarts
    if restart or (new.learning_rate, new.warmup_steps) != (old.learning_rate, old.warmup_steps):
        run.set_lr(new.learning_rate, warmup_steps=new.warmup_steps, restart=restart)
    if new.batches != old.batches:
        run.set_batches(new.batches)
    run.set_evaluation(eval_interval=new.eval_interval, eval_iters=new.eval_iters)


def fit_batch_size(run: TrainingRun, value: float | Mapping[str, float] | None) -> BatchPlan:
    """`adjust_batch_size`: the largest micro-batch that fits into memory, in steps of the same size.

    A run does not end for want of a faster division: where not even one sequence is estimated to fit, the
    division with one is taken, and where none divides the step, the present one stays.

    Args:
        run: The run.
        value: A fraction of the memory, or `{target_vram_percent, max_batch_size}`; None means
            `memory_target_fraction`.

    Returns:
        The division of a rank's part of the step. All ranks agree on it.
    """
    options = value if isinstance(value, Mapping) else {}
    percent, most = options.get("target_vram_percent"), options.get("max_batch_size")
    fraction = value if isinstance(value, (int, float)) else None if percent is None else percent / 100
    try:
        return run.largest_micro_batch(fraction=fraction, most=None if most is None else int(most))
    except OutOfMemory as error:
        run.log(f"adjust_batch_size: {error}")
        return BatchPlan(1, run.batches.micro_batch_size * run.batches.gradient_accumulation_steps)
    except UsageError as error:
        run.log(f"adjust_batch_size changes nothing: {error}")
        return run.batches


_FIELDS = {
    "batch_size": "micro_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "warmup_iters": "warmup_steps",
    "eval_iters": "eval_iters",
    "eval_interval": "eval_interval",
}

SettingOperation = Callable[[RunSettings, Operation], RunSettings]


def _set(field: str, least: int) -> SettingOperation:
    def change(settings: RunSettings, operation: Operation) -> RunSettings:
        return replace(settings, **{field: max(least, int(operation.value))})

    return change


def _multiply(field: str, least: int) -> SettingOperation:
    def change(settings: RunSettings, operation: Operation) -> RunSettings:
        present = getattr(settings, field)
        if present is None:
            raise UsageError(
                f"there is nothing to multiply: {field} is not set; use set_{field} with a number"
            )
        return replace(settings, **{field: max(least, round(present * operation.value))})

    return change


SETTING_OPERATIONS: Mapping[str, SettingOperation] = {
    "set_lr": lambda settings, operation: replace(settings, learning_rate=float(operation.value)),
    "change_lr": lambda settings, operation: replace(
        settings, learning_rate=settings.learning_rate * operation.value
    ),
    "reset_lr_schedule": lambda settings, operation: replace(settings, restarts=settings.restarts + 1),
    **{f"set_{name}": _set(field, field != "warmup_steps") for name, field in _FIELDS.items()},
    **{f"change_{name}": _multiply(field, field != "warmup_steps") for name, field in _FIELDS.items()},
}
"""Name of an operation → what it makes of the settings."""
