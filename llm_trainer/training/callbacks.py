"""Hooks at exact places of the training loop, and early stopping as the first user of them.

A callback's state is part of the checkpoint: what it knows after a resume is what it would have known without
the interruption (early stopping that forgets its best loss on resume is a classic defect,
transformers#28544).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.errors import CheckpointError

if TYPE_CHECKING:
    from llm_trainer.run_dir import JSON
    from llm_trainer.training.engines.validation import ValidationResult
    from llm_trainer.training.trainer import Trainer


class Callback:
    """Does nothing; override the hooks you need. Hooks run on every rank, in the order in which the callbacks
    were given.
    """

    validates_at_start = False
    """Whether the run has to validate before its first step, for this callback to judge by."""

    def on_train_start(self, trainer: Trainer) -> None:
        """After the checkpoint, if any, was restored (callbacks' states included), before the first step."""

    def on_step_end(self, trainer: Trainer, step: int) -> None:
        """After the optimizer's update number `step` (1 is the first), before this step's logging, validation
        and saving.
        """

    def on_validation(self, trainer: Trainer, result: ValidationResult) -> None:
        """After a validation at `trainer.current_step`, before the best model is saved and before this step's
        checkpoint.
        """

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """After a checkpoint lies in its place, verified; its state no longer changes."""

    def between_steps(self, trainer: Trainer, step: int, validation: ValidationResult | None) -> None:
        """With everything of step `step` done but its checkpoint, unless it is the last: the place to change
        what comes next.

        A new run calls it with step 0 before its first step. `validation` is this step's, if there was one.
        """

    def on_train_end(self, trainer: Trainer) -> None:
        """After the last step, before the final model is saved; also when the run was told to stop."""

    def state_dict(self) -> dict[str, JSON]:
        """What the callback must know after a resume, as JSON."""
        return {}

    def load_state_dict(self, state: Mapping[str, JSON]) -> None:
        """Take up the state that `state_dict` gave, before `on_train_start`."""


class EarlyStopping(Callback):
    """Ends the run after `patience` validations in a row whose loss is not lower than the best by more than
    `min_delta` nats.

    A loss that is not a number is never the best and counts as no improvement.
    """

    def __init__(self, patience: int, min_delta: float = 0.0) -> None:
        self.patience = patience
        self.min_delta = min_delta
        self.best_loss: float | None = None
        self.validations_without_gain = 0

    def on_train_start(self, trainer: Trainer) -> None:
        """A run that had stopped is not taken further by a resume, unless that says a larger patience (or
        none).
        """
        if self.validations_without_gain >= self.patience:
            trainer.say(
                f"{self.validations_without_gain} validations without a better loss had ended this run: it stays at step "
                f"{trainer.current_step}; a larger early_stopping_patience, or none, goes on"
            )
            trainer.stop_training = True

    def on_validation(self, trainer: Trainer, result: ValidationResult) -> None:
        """Count, and ask the trainer to stop when patience is used up."""
        if math.isfinite(result.loss) and (
            self.best_loss is None or result.loss < self.best_loss - self.min_delta
        ):
            self.best_loss, self.validations_without_gain = result.loss, 0
            return
        self.validations_without_gain += 1
        if self.validations_without_gain >= self.patience:
            trainer.stop_training = True

    def state_dict(self) -> dict[str, JSON]:
        """Best loss so far and how long ago it was."""
        return {"best_loss": self.best_loss, "validations_without_gain": self.validations_without_gain}

    def load_state_dict(self, state: Mapping[str, JSON]) -> None:
        """Take up an earlier count; raises CheckpointError where it is none."""
        best, count = state.get("best_loss"), state.get("validations_without_gain")
        if not (best is None or isinstance(best, (int, float))) or not isinstance(count, int):
            raise CheckpointError(f"state of early stopping is not one: {dict(state)!r}")
        self.best_loss, self.validations_without_gain = best, count
