"""Hooks at fixed points of the training loop.

A callback's state is part of the checkpoint: after a resume it knows what it would have known without the
interruption (early stopping that forgets its best loss on resume is a classic defect, transformers#28544).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llm_trainer.run_dir import JSON
from llm_trainer.training.engines.validation import ValidationResult
from llm_trainer.training.run import TrainingRun


class Callback:
    """Does nothing; override the hooks you need. Hooks run on every rank, in the order of the callbacks.

    Attributes:
        validates_at_start: Whether the run has to validate before its first step, because the callback judges
            by that.
    """

    validates_at_start = False

    def on_train_start(self, run: TrainingRun) -> None:
        """Called before the first step, after a checkpoint (with the callbacks' states) was restored."""

    def on_step_end(self, run: TrainingRun, step: int) -> None:
        """Called after update number `step` (from 1), before this step's logging, validation and saving."""

    def on_validation(self, run: TrainingRun, result: ValidationResult) -> None:
        """Called after a validation, before the best model and this step's checkpoint are saved."""

    def on_checkpoint(self, run: TrainingRun, path: Path) -> None:
        """Called after a checkpoint was written and verified. It no longer changes."""

    def between_steps(self, run: TrainingRun, step: int, validation: ValidationResult | None) -> None:
        """Called when everything of step `step` but its checkpoint is done, unless it is the last step: the
        place to change what comes next. A new run calls it with step 0 before its first step.

        Args:
            run: The run, whose methods change it.
            step: Updates so far.
            validation: This step's validation, if there was one.
        """

    def on_train_end(self, run: TrainingRun) -> None:
        """Called after the last step, before the final model is saved; also when the run was stopped."""

    def state_dict(self) -> dict[str, JSON]:
        """What the callback must know after a resume, as JSON."""
        return {}

    def load_state_dict(self, state: Mapping[str, JSON]) -> None:
        """Restore what `state_dict` returned. Called before `on_train_start`."""
