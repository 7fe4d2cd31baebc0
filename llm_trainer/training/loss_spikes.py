"""The rule that detects a loss spike from the losses of past steps.

A step's loss is an outlier when it lies more than `spike_sigma` standard deviations above the mean of the
last `spike_window` steps (rule and constants, 6 and 128, are those of OLMo-core's `SkipStepOptimizer`).
`spike_patience` outliers in a row are a spike (llm-foundry's `KillLossSpike` waits for four): a single odd
batch is over with the next step and needs no rollback. Outliers do not enter the window, so a loss that stays
high cannot raise its own threshold.

What the run does about a spike is in `callbacks/spike_rollback.py`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm_trainer.config import TrainingConfig


@dataclass
class SpikeState:
    """What the rule remembers. It is part of the checkpoint, so a resumed run rolls back at the same step.

    Attributes:
        losses: Losses in the window, in nats per token, oldest first.
        outliers: Outliers in a row so far.
        first_outlier: Step of the first of them.
        rollbacks: How often the run has rolled back.
        skipped_samples: Samples that rollbacks have skipped.
    """

    losses: list[float] = field(default_factory=list)
    outliers: int = 0
    first_outlier: int | None = None
    rollbacks: int = 0
    skipped_samples: int = 0

    @classmethod
    def from_json(cls, stored: Mapping[str, object]) -> SpikeState:
        """Read the state that a checkpoint stores.

        Raises:
            TypeError: If it has names that are not fields of this class.
        """
        return cls(**stored)  # type: ignore[arg-type]

    def with_empty_window(self) -> SpikeState:
        """The state with no losses seen: losses of another model are no measure."""
        return SpikeState(rollbacks=self.rollbacks, skipped_samples=self.skipped_samples)

    def update(self, step: int, loss: float, training: TrainingConfig) -> None:
        """Judge the loss of one step. Keeps nothing where `max_rollbacks` is 0.

        Args:
            step: Number of the update, from 1.
            loss: Its mean loss, in nats per token.
            training: The settings of the rule.
        """
        if training.max_rollbacks == 0 or self.is_spike(training):
            return
        if loss > self.threshold(training):
            self.first_outlier = self.first_outlier or step
            self.outliers += 1
            return
        self.outliers, self.first_outlier = 0, None
        self.losses = [*self.losses, loss][-training.spike_window :]

    def threshold(self, training: TrainingConfig) -> float:
        """The loss above which a step is an outlier; infinite until half of the window is filled."""
        if len(self.losses) < max(2, training.spike_window // 2):
            return math.inf
        return statistics.fmean(self.losses) + training.spike_sigma * statistics.stdev(self.losses)

    def is_spike(self, training: TrainingConfig) -> bool:
        """Whether the run should roll back now."""
        return training.max_rollbacks > 0 and training.spike_patience <= self.outliers


def lr_factor_after_rollbacks(state: SpikeState, training: TrainingConfig) -> float:
    """The factor on the learning rate after the rollbacks so far (`spike_lr_factor` for each)."""
    return float(training.spike_lr_factor**state.rollbacks)
