"""How long a run is, and the learning rate at each of its steps.

Both are pure functions: of the configuration, the size of the data and the step. Nothing is counted up on the
way, so a resumed run, a run on other numbers of ranks and a run read backwards have the same rates. What
operations may change while a run goes on (the rate's factor, where the schedule starts again) is the small
`ScheduleState`, which is in the checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal

from llm_trainer.config import TrainingConfig, UsageError
from llm_trainer.config.duration import Duration

Kind = Literal["cosine", "linear", "constant", "wsd"]

DEFAULT_WARMUP_STEPS = 2000
DEFAULT_MINIMUM_FRACTION = 0.1


@dataclass(frozen=True)
class ScheduleState:
    """What operations change: the rate is multiplied by `factor`, and step `offset` is where warm-up and
    decay start.
    """

    factor: float = 1.0
    offset: int = 0


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then a decay of the given kind that reaches `minimum_fraction` of the peak at `decay_steps`."""

    kind: Kind
    warmup_steps: int
    decay_steps: int
    minimum_fraction: float
    wsd_decay_fraction: float = 0.2

    def factor(self, step: int, state: ScheduleState | None = None) -> float:
        """What the peak rate is multiplied by for the update that turns step `step` into `step + 1`."""
        state = state or ScheduleState()
        return state.factor * learning_rate_factor(
            step - state.offset,
            kind=self.kind,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps - state.offset,
            minimum_fraction=self.minimum_fraction,
            wsd_decay_fraction=self.wsd_decay_fraction,
        )

    def to_json(self) -> dict[str, str | int | float]:
        """For the checkpoint."""
        return asdict(self)


@dataclass(frozen=True)
class Length:
    """A run's length and what said so: `steps` updates, of `tokens_per_step` tokens, `steps_per_epoch` of
    them in one pass.
    """

    steps: int
    said_by: str
    steps_per_epoch: float
    tokens_per_step: int

    def in_steps(self, duration: Duration) -> int:
        """A duration in whole steps of this run, at least one."""
        return max(
            1, duration.steps(steps_per_epoch=self.steps_per_epoch, tokens_per_step=self.tokens_per_step)
        )


def learning_rate_factor(
    step: int,
    *,
    kind: Kind,
    warmup_steps: int,
    decay_steps: int,
    minimum_fraction: float,
    wsd_decay_fraction: float = 0.2,
) -> float:
    """Share of the peak rate at `step` (the first is 0).

    The warm-up is (step + 1) / (warmup_steps + 1), so that the first update is not wasted on a rate of zero
    and the peak is reached at step `warmup_steps`. After `decay_steps` the rate stays at `minimum_fraction`.
    cosine: Loshchilov & Hutter 2017, arXiv:1608.03983; wsd (warm-up, stable, decay: flat, then linear over
    the last `wsd_decay_fraction` of the steps): Hu et al. 2024, arXiv:2404.06395.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if kind == "constant":
        return 1.0
    if step >= decay_steps:
        return minimum_fraction
    flat_until = decay_steps - math.ceil(wsd_decay_fraction * decay_steps) if kind == "wsd" else 0
    decay_start = max(warmup_steps, flat_until)
    if step < decay_start:
        return 1.0
    done = (step - decay_start) / max(1, decay_steps - decay_start)
    remaining = 0.5 * (1.0 + math.cos(math.pi * done)) if kind == "cosine" else 1.0 - done
    return minimum_fraction + (1.0 - minimum_fraction) * remaining


def resolve_length(
    training: TrainingConfig, *, samples_per_epoch: int, sequences_per_step: int, context: int
) -> Length:
    """The run's length in steps: of `max_steps`, `num_epochs` and `max_tokens` whichever ends first; one
    epoch when none is given.
    """
    steps_per_epoch = samples_per_epoch / sequences_per_step
    tokens_per_step = sequences_per_step * context
    ends: list[tuple[int, str]] = []
    if training.max_steps is not None:
        ends.append((training.max_steps, f"max_steps {training.max_steps}"))
    if training.max_tokens is not None:
        ends.append((math.ceil(training.max_tokens / tokens_per_step), f"max_tokens {training.max_tokens:,}"))
    epochs = training.num_epochs if training.num_epochs is not None or ends else 1.0
    if epochs is not None:
        ends.append((max(1, math.ceil(epochs * steps_per_epoch - 1e-9)), f"num_epochs {epochs:g}"))
    steps, said_by = min(ends)
    return Length(steps, said_by, steps_per_epoch, tokens_per_step)


def resolve_schedule(training: TrainingConfig, length: Length) -> Schedule:
    """Turn the settings into a schedule in steps. Raises UsageError for a warm-up that was said and is longer
    than the run.
    """
    decay_steps = (
        length.steps if training.lr_decay_steps is None else length.in_steps(training.lr_decay_steps)
    )
    warmup = training.warmup_steps
    if warmup is not None and not training.is_said("warmup_steps") and length.in_steps(warmup) > length.steps:
        training.warmup_steps = None  # a command's default longer than the run becomes a tenth of it, also in the settings that are saved
    if training.warmup_steps is None:
        warmup_steps = min(DEFAULT_WARMUP_STEPS, length.steps // 10)
    else:
        said = training.warmup_steps
        warmup_steps = said.steps(
            steps_per_epoch=length.steps_per_epoch, tokens_per_step=length.tokens_per_step
        )
        if warmup_steps > length.steps:
            raise UsageError(
                f"warmup_steps {said} is longer than the run of {length.steps} steps ({length.said_by}); shorten it or train longer"
            )
        if training.lr_decay_steps is not None and warmup_steps > decay_steps:
            raise UsageError(
                f"warmup_steps {said} is longer than lr_decay_steps {training.lr_decay_steps}; shorten it or decay longer"
            )
    return Schedule(
        training.lr_scheduler,
        warmup_steps,
        decay_steps,
        _minimum_fraction(training),
        training.wsd_decay_fraction,
    )


def _minimum_fraction(training: TrainingConfig) -> float:
    if training.min_learning_rate is None:
        return DEFAULT_MINIMUM_FRACTION
    if training.min_learning_rate > training.learning_rate:
        raise UsageError(
            f"min_learning_rate {training.min_learning_rate:g} is above learning_rate {training.learning_rate:g}; lower it"
        )
    return training.min_learning_rate / training.learning_rate if training.learning_rate else 0.0
