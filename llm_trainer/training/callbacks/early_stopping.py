"""Ends a run whose validation loss no longer falls."""

from __future__ import annotations

import math
from collections.abc import Mapping

from llm_trainer.errors import CheckpointError
from llm_trainer.run_dir import JSON
from llm_trainer.training.callbacks.callback import Callback
from llm_trainer.training.engines.validation import ValidationResult
from llm_trainer.training.run import TrainingRun


class EarlyStopping(Callback):
    """Stops the run after `patience` validations in a row without a better loss.

    A loss that is not a number is never the best and counts as no improvement.

    Args:
        patience: Validations to wait for.
        min_delta: How much lower than the best a loss must be to count, in nats per token.
    """

    def __init__(self, patience: int, min_delta: float = 0.0) -> None:
        self.patience = patience
        self.min_delta = min_delta
        self.best_loss: float | None = None
        self.validations_without_gain = 0

    def on_train_start(self, run: TrainingRun) -> None:
        """A run that had stopped is not continued by a resume, unless its patience was raised or removed."""
        if self.validations_without_gain >= self.patience:
            run.log(
                f"early stopping had ended this run at step {run.current_step}, after "
                f"{self.validations_without_gain} validations without a better loss; to continue, raise "
                "early_stopping_patience or leave it out"
            )
            run.stop()

    def on_validation(self, run: TrainingRun, result: ValidationResult) -> None:
        """Count, and stop the run when patience is used up."""
        if math.isfinite(result.loss) and (
            self.best_loss is None or result.loss < self.best_loss - self.min_delta
        ):
            self.best_loss, self.validations_without_gain = result.loss, 0
            return
        self.validations_without_gain += 1
        if self.validations_without_gain >= self.patience:
            run.stop()

    def state_dict(self) -> dict[str, JSON]:
        """The best loss so far and how long ago it was."""
        return {"best_loss": self.best_loss, "validations_without_gain": self.validations_without_gain}

    def load_state_dict(self, state: Mapping[str, JSON]) -> None:
        """Restore the count.

        Raises:
            CheckpointError: If `state` is not one of early stopping.
        """
        best, count = state.get("best_loss"), state.get("validations_without_gain")
        if not (best is None or isinstance(best, (int, float))) or not isinstance(count, int):
            raise CheckpointError(f"the checkpoint's state of early stopping is damaged: {dict(state)!r}")
        self.best_loss, self.validations_without_gain = best, count
