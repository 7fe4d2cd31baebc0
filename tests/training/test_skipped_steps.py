"""A step whose loss is not finite has no loss in the records: not its own, and not an earlier step's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_run import tiny_trainer

from llm_trainer.model.transformer import Transformer
from llm_trainer.training.logging.metrics import read_metrics
from llm_trainer.training.objectives.objective import LossSum, NextToken
from llm_trainer.training.trainer import Trainer


class NotANumberAt(NextToken):
    """A loss that is not a number at some steps."""

    def __init__(self, steps: set[int], trainer: Trainer) -> None:
        super().__init__()
        self.steps, self.trainer = steps, trainer

    def from_hidden_states(self, model: Transformer, hidden: torch.Tensor, labels: torch.Tensor) -> LossSum:
        loss = super().from_hidden_states(model, hidden, labels)
        wrong = model.training and self.trainer.current_step + 1 in self.steps
        return LossSum(loss.total * math.nan, loss.tokens) if wrong else loss


def trainer_with_nan_at(folder: Path, steps: set[int], **settings: object) -> Trainer:
    trainer = tiny_trainer(folder, **settings)  # type: ignore[arg-type]
    trainer.run.engine.objective = NotANumberAt(steps, trainer)
    return trainer


def test_a_skipped_step_has_no_loss_and_no_norm_and_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(width=200)
    result = trainer_with_nan_at(tmp_path, {3, 4, 10}, console=console, max_skipped_steps=5).train()
    lines = {int(line["step"]): line for line in read_metrics(tmp_path) if "learning_rate" in line}
    assert sorted(lines) == list(range(1, 11))
    assert {step for step, line in lines.items() if "loss" not in line} == {3, 4, 10}
    assert {step for step, line in lines.items() if "gradient_norm" not in line} == {3, 4, 10}
    assert [lines[step]["skipped_steps"] for step in range(1, 11)] == [0, 0, 1, 2, 2, 2, 2, 2, 2, 3]
    printed = capsys.readouterr().out
    skipped = ("step 3/10", "step 4/10", "step 10/10")
    shown = [line for line in printed.splitlines() if line.startswith(skipped)]
    assert len(shown) == 3
    assert all("loss nan" in line and "norm" not in line for line in shown)
    assert printed.count("loss nan") == 3 + 3  # each skipped step has a line that says so as well
    assert result.loss is not None
    assert math.isnan(result.loss)


def test_the_count_of_skipped_steps_is_resumed(tmp_path: Path) -> None:
    trainer_with_nan_at(tmp_path, {2}, max_steps=10).train()
    resumed = tiny_trainer(tmp_path, resume_from=str(tmp_path / "checkpoint-6"))
    resumed.train()
    assert resumed.run.state.skipped_steps == 1
    assert read_metrics(tmp_path)[-1]["step"] == 10
    assert [line["skipped_steps"] for line in read_metrics(tmp_path) if "skipped_steps" in line][-1] == 1
