"""The length of a run in steps, and its learning rate at each step.

Both are pure functions of the configuration, the size of the data and the step. No counter is kept, so a
resumed run and a run on another number of ranks have the same learning rates at the same steps. What
operations may change during a run (a factor, and the step at which the schedule restarts) is the small
`LRScheduleState`, which is saved in the checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from llm_trainer.config import TrainingConfig, UsageError
from llm_trainer.config.duration import Duration

ScheduleKind = Literal["cosine", "linear", "constant", "wsd"]

DEFAULT_WARMUP_STEPS = 2000
DEFAULT_MINIMUM_FRACTION = 0.1


@dataclass(frozen=True)
class LRScheduleState:
    """What operations may change about the schedule.

    Attributes:
        factor: The learning rate is multiplied by it.
        offset: The step at which warm-up and decay start.
    """

    factor: float = 1.0
    offset: int = 0


@dataclass(frozen=True)
class LRSchedule:
    """A warm-up followed by a decay to `minimum_fraction` of the peak learning rate.

    Attributes:
        kind: The shape of the decay.
        warmup_steps: The step at which the peak is reached.
        decay_steps: The step at which the decay ends.
        minimum_fraction: The lowest learning rate, as a fraction of the peak.
        wsd_decay_fraction: For "wsd", the fraction of the steps over which the rate decays.
    """

    kind: ScheduleKind
    warmup_steps: int
    decay_steps: int
    minimum_fraction: float
    wsd_decay_fraction: float = 0.2

    def factor(self, step: int, state: LRScheduleState | None = None) -> float:
        """Return what the peak learning rate is multiplied by at a step.

        Args:
            step: The step, counted from 0: the update that turns `step` into `step + 1`.
            state: The changes that operations have made; None for none.
        """
        state = state or LRScheduleState()
        return state.factor * lr_factor(
            step - state.offset,
            kind=self.kind,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps - state.offset,
            minimum_fraction=self.minimum_fraction,
            wsd_decay_fraction=self.wsd_decay_fraction,
        )


@dataclass(frozen=True)
class RunLength:
    """The length of a run.

    Attributes:
        steps: The number of optimizer updates.
        set_by: The setting that determines it, with its value, for messages.
        steps_per_epoch: The steps in one pass over the data.
        tokens_per_step: The tokens in one step, over all ranks.
    """

    steps: int
    set_by: str
    steps_per_epoch: float
    tokens_per_step: int

    def in_steps(self, duration: Duration) -> int:
        """Return a duration as a whole number of steps of this run, at least one."""
        return max(
            1, duration.steps(steps_per_epoch=self.steps_per_epoch, tokens_per_step=self.tokens_per_step)
        )


def lr_factor(
    step: int,
    *,
    kind: ScheduleKind,
    warmup_steps: int,
    decay_steps: int,
    minimum_fraction: float,
    wsd_decay_fraction: float = 0.2,
) -> float:
    """Return the learning rate at a step as a fraction of the peak.

    The warm-up is (step + 1) / (warmup_steps + 1), so that the first update is not wasted on a rate of zero
    and the peak is reached at step `warmup_steps`. After `decay_steps` the rate stays at `minimum_fraction`.
    "cosine" is from Loshchilov & Hutter 2017, arXiv:1608.03983. "wsd" (warm-up, stable, decay) is constant,
    then linear over the last `wsd_decay_fraction` of the steps: Hu et al. 2024, arXiv:2404.06395.

    Args:
        step: The step, counted from 0.
        kind: The shape of the decay.
        warmup_steps: The step at which the peak is reached.
        decay_steps: The step at which the decay ends.
        minimum_fraction: The lowest rate, as a fraction of the peak.
        wsd_decay_fraction: For "wsd", the fraction of the steps over which the rate decays.
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


def resolve_run_length(
    training: TrainingConfig, *, samples_per_epoch: int, sequences_per_step: int, context: int
) -> RunLength:
    """Return the length of a run: whichever of `max_steps`, `num_epochs` and `max_tokens` ends first.

    It is one epoch if none of them is set.

    Args:
        training: The settings.
        samples_per_epoch: The samples in one pass over the data.
        sequences_per_step: The sequences in one step, over all ranks.
        context: Tokens per sequence.
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
    steps, set_by = min(ends)
    return RunLength(steps, set_by, steps_per_epoch, tokens_per_step)


def with_fitting_warmup(training: TrainingConfig, length: RunLength) -> TrainingConfig:
    """Settings whose default warm-up fits into the run.

    A warm-up that is a command's default and longer than the run is left out, which means a tenth of the run.

    Args:
        training: The settings. They are not changed.
        length: The length of the run.
    """
    warmup = training.warmup_steps
    if warmup is None or training.is_set("warmup_steps") or length.in_steps(warmup) <= length.steps:
        return training
    return training.model_copy(update={"warmup_steps": None})


def resolve_lr_schedule(training: TrainingConfig, length: RunLength) -> LRSchedule:
    """Return the schedule of the settings, in steps.

    Args:
        training: The settings.
        length: The length of the run.

    Raises:
        UsageError: A warm-up that the user has set is longer than the run or the decay, or the minimum
            learning rate is above the peak.
    """
    decay_steps = (
        length.steps if training.lr_decay_steps is None else length.in_steps(training.lr_decay_steps)
    )
    training = with_fitting_warmup(training, length)
    if training.warmup_steps is None:
        warmup_steps = min(DEFAULT_WARMUP_STEPS, length.steps // 10)
    else:
        requested = training.warmup_steps
        warmup_steps = requested.steps(
            steps_per_epoch=length.steps_per_epoch, tokens_per_step=length.tokens_per_step
        )
        if warmup_steps > length.steps:
            raise UsageError(
                f"warmup_steps {requested} is longer than the run of {length.steps} steps ({length.set_by}); "
                "shorten it or train longer"
            )
        if training.lr_decay_steps is not None and warmup_steps > decay_steps:
            raise UsageError(
                f"warmup_steps {requested} is longer than lr_decay_steps {training.lr_decay_steps}; "
                "shorten it or raise lr_decay_steps"
            )
    return LRSchedule(
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
            f"min_learning_rate {training.min_learning_rate:g} is above "
            f"learning_rate {training.learning_rate:g}; lower it"
        )
    return training.min_learning_rate / training.learning_rate if training.learning_rate else 0.0
