"""Hooks run where their docstrings say, and a callback's state survives a resume."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tiny_run import tiny_run, tiny_trainer

from llm_trainer.config import CheckpointError
from llm_trainer.diagnostics.verify_resume import StopAtStep, compare_checkpoints
from llm_trainer.training.callbacks.callback import Callback
from llm_trainer.training.callbacks.early_stopping import EarlyStopping
from llm_trainer.training.checkpoint.store import read_state
from llm_trainer.training.engines.validation import ValidationResult
from llm_trainer.training.run import TrainingRun


class Recorder(Callback):
    """Writes down every call."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_train_start(self, run: TrainingRun) -> None:
        self.calls.append(f"start {run.current_step}")

    def on_step_end(self, run: TrainingRun, step: int) -> None:
        assert run.current_step == step
        self.calls.append(f"step {step}")

    def on_validation(self, run: TrainingRun, result: ValidationResult) -> None:
        assert math.isfinite(result.loss)
        self.calls.append(f"validation {run.current_step}")

    def on_checkpoint(self, run: TrainingRun, path: Path) -> None:
        assert (path / "manifest.json").is_file()
        self.calls.append(path.name)

    def on_train_end(self, run: TrainingRun) -> None:
        self.calls.append(f"end {run.current_step}")


def stopped_after(losses: list[float], **settings: float) -> int | None:
    """How many validations it took until the trainer was asked to stop."""

    class Run:
        stop_requested = False

        def stop(self) -> None:
            self.stop_requested = True

    stopping, run = EarlyStopping(**settings), Run()  # type: ignore[arg-type]
    for number, loss in enumerate(losses, 1):
        stopping.on_validation(run, ValidationResult(loss, 1, 1.0))  # type: ignore[arg-type]
        if run.stop_requested:
            return number
    return None


def test_hooks_run_in_the_documented_order(tmp_path: Path) -> None:
    recorder = Recorder()
    tiny_run(tmp_path, callbacks=[recorder], max_steps=4, eval_interval=2, save_interval=2)
    assert recorder.calls == [
        "start 0", "step 1", "step 2", "validation 2", "checkpoint-2",
        "step 3", "step 4", "validation 4", "end 4",
    ]  # fmt: skip


def test_on_train_start_comes_after_the_checkpoint_was_restored(tmp_path: Path) -> None:
    tiny_run(tmp_path, callbacks=[StopAtStep(4)])
    recorder = Recorder()
    tiny_run(tmp_path, callbacks=[recorder], resume_from=str(tmp_path))
    assert recorder.calls[:2] == ["start 4", "step 5"]


@pytest.mark.parametrize(
    ("losses", "settings", "stops"),
    [
        ([3.0, 2.0, 2.0, 2.0], {"patience": 2}, 4),
        ([3.0, 2.0, 2.1, 1.9, 2.0], {"patience": 2}, None),
        ([3.0, 2.95, 2.91], {"patience": 2, "min_delta": 0.1}, 3),
        ([math.nan, math.nan], {"patience": 2}, 2),
        ([3.0, math.nan, 2.0, -math.inf, 2.5], {"patience": 2}, 5),
    ],
)
def test_early_stopping_counts_validations_without_a_better_loss(
    losses: list[float], settings: dict[str, float], stops: int | None
) -> None:
    assert stopped_after(losses, **settings) == stops


def test_the_configuration_switches_early_stopping_on(tmp_path: Path) -> None:
    """A rate of zero cannot improve anything: the first validation is the best, the next two are no
    better.
    """
    result = tiny_run(tmp_path, early_stopping_patience=2, learning_rate=0.0, eval_interval=1)
    assert (result.ended_by, result.step) == ("stopped", 3)


def test_early_stopping_remembers_its_best_across_a_resume(tmp_path: Path) -> None:
    settings = {"early_stopping_patience": 2, "learning_rate": 0.0, "eval_interval": 1, "save_interval": 1}
    straight = tiny_run(tmp_path / "straight", **settings)
    tiny_run(tmp_path / "cut", callbacks=[StopAtStep(2)], **settings)
    resumed = tiny_run(tmp_path / "cut", resume_from=str(tmp_path / "cut"), **settings)
    assert resumed.step == straight.step == 3
    assert (
        read_state(tmp_path / "cut" / "final_model")["callbacks"]
        == read_state(tmp_path / "straight" / "final_model")["callbacks"]
    )
    assert compare_checkpoints(tmp_path / "cut" / "final_model", tmp_path / "straight" / "final_model") == []


@pytest.mark.parametrize(("patience", "step"), [(2, 3), (4, 5), (None, 10)])
def test_a_run_that_early_stopping_ended_continues_only_with_a_larger_patience(
    tmp_path: Path, patience: int | None, step: int
) -> None:
    """The step that stops the run writes its checkpoint too."""
    settings = {"learning_rate": 0.0, "eval_interval": 1, "save_interval": 1}
    assert tiny_run(tmp_path, early_stopping_patience=2, **settings).step == 3
    (tmp_path / "final_model").rename(tmp_path / "moved_away")
    resumed = tiny_run(tmp_path, resume_from=str(tmp_path), early_stopping_patience=patience, **settings)
    assert (resumed.ended_by, resumed.step) == ("stopped" if patience else "finished", step)
    if patience == 2:
        assert compare_checkpoints(tmp_path / "final_model", tmp_path / "moved_away") == []


def test_a_nan_loss_is_never_the_best(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, eval_interval=1, max_steps=3)
    real, losses = trainer.run.evaluate, iter([2.0, math.nan, 3.0])
    trainer.run.evaluate = lambda: ValidationResult(next(losses), real().tokens, 1.0)  # type: ignore[method-assign]
    trainer.train()
    assert read_state(tmp_path / "best_model")["step"] == 1


def test_a_damaged_state_of_early_stopping_is_refused() -> None:
    with pytest.raises(CheckpointError, match="early stopping"):
        EarlyStopping(2).load_state_dict({"best_loss": "low", "validations_without_gain": 1})
