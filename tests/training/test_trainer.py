"""The training loop: it learns, it may be subclassed as the manual shows, and its parts agree with each
other.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_run import tiny_config, tiny_model, tiny_run, tiny_trainer, tokens

from llm_trainer.config import DataError, UsageError
from llm_trainer.run_dir import BEST_MODEL, FINAL_MODEL
from llm_trainer.training.logging.metrics import read_metrics
from llm_trainer.training.trainer import Trainer


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_falls_to_the_noise_of_the_data(tmp_path: Path, optimizer: str, precision: str) -> None:
    shape = {"dropout": 0.0}
    result = tiny_run(
        tmp_path,
        model=shape,
        optimizer=optimizer,
        precision=precision,
        max_steps=120,
        save_interval=None,
        eval_interval=120,
    )
    assert result.validation is not None
    # Each id is one of two, and the one before determines which pairs are left: at most ln 4 = 1.39 nats; at
    # the start ln 32 = 3.47.
    assert result.validation.loss < 1.4
    assert result.loss is not None
    assert result.loss < 1.4
    assert (result.ended_by, result.step, result.tokens) == ("finished", 120, 120 * 64)


def test_the_custom_metrics_of_the_manual_work_as_shown(tmp_path: Path) -> None:
    class CustomTrainer(Trainer):
        def _log_metrics(self, loss: float) -> None:
            super()._log_metrics(loss)
            custom_metrics = {"custom/metric1": loss * 2, "custom/metric2": 7.0}
            self.metrics_tracker.update(custom_metrics, self.current_step)

    config = tiny_config(tmp_path, logging_steps=5)
    CustomTrainer(tiny_model(config.model), config, tokens(), console=Console(quiet=True)).train()
    lines = read_metrics(tmp_path)
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    custom = {line["step"]: line["custom/metric1"] for line in lines if "custom/metric1" in line}
    assert set(custom) == {5, 10}
    assert custom == {step: loss * 2 for step, loss in losses.items()}


def test_metrics_have_all_that_a_report_needs(tmp_path: Path) -> None:
    tiny_run(tmp_path)
    lines = read_metrics(tmp_path)
    training = next(line for line in lines if "loss" in line)
    assert {
        "loss",
        "learning_rate",
        "gradient_norm",
        "tokens",
        "tokens_per_second",
        "mfu",
        "memory_gb",
    } <= training.keys()
    assert training.pop("skipped_steps") == 0
    assert all(math.isfinite(value) and value > 0 for value in training.values())
    validation = next(line for line in lines if "val_loss" in line)
    assert validation["perplexity"] == pytest.approx(math.exp(validation["val_loss"]))


def test_reported_rates_are_those_of_the_steps_updates(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=3, warmup_steps=2)
    trainer.train()
    rates = [line["learning_rate"] for line in read_metrics(tmp_path) if "learning_rate" in line]
    assert rates == pytest.approx([1e-2 / 3, 1e-2 * 2 / 3, 1e-2])


def test_validation_and_saving_come_at_their_intervals_and_the_end_is_validated(tmp_path: Path) -> None:
    tiny_run(tmp_path, max_steps=10, eval_interval=4, save_interval=3, save_total_limit=None)
    assert [line["step"] for line in read_metrics(tmp_path) if "val_loss" in line] == [4, 8, 10]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-6",
        "checkpoint-9",
    ]
    assert (tmp_path / FINAL_MODEL).is_dir()
    assert (tmp_path / BEST_MODEL).is_dir()


def test_checkpoints_by_minutes_and_at_every_validation(tmp_path: Path) -> None:
    tiny_run(
        tmp_path / "minutes",
        max_steps=3,
        save_interval=None,
        save_minutes=1e-9,
        save_total_limit=None,
        eval_interval=100,
    )
    assert sorted(path.name for path in (tmp_path / "minutes").glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-2",
    ]
    tiny_run(
        tmp_path / "always",
        max_steps=5,
        save_interval=None,
        always_save_checkpoint=True,
        eval_interval=2,
        save_total_limit=None,
    )
    assert sorted(path.name for path in (tmp_path / "always").glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
    ]


def test_a_limit_in_minutes_saves_and_ends_the_run(tmp_path: Path) -> None:
    result = tiny_run(tmp_path, max_minutes=1e-9)
    assert (result.ended_by, result.step, result.exit_code) == ("time", 1, 0)
    assert (tmp_path / "emergency-1").is_dir()


def test_evaluating_only_changes_and_saves_nothing(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, eval_only=True)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    result = trainer.train()
    assert result.ended_by == "evaluated"
    assert result.validation is not None
    assert all(torch.equal(one, other) for one, other in zip(before, trainer.model.parameters(), strict=True))
    assert not list(tmp_path.glob("*model"))
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_trainer_evaluates_without_training(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", precision="auto")
    assert trainer.evaluate().loss == pytest.approx(math.log(32), abs=0.5)
    assert not (tmp_path / "run").exists()


def test_accumulated_training_equals_training_on_full_batches(tmp_path: Path) -> None:
    weights = []
    for micro, accumulation in ((8, 1), (4, 2), (2, 4)):
        trainer = tiny_trainer(
            tmp_path / f"{micro}",
            model={"dropout": 0.0},
            batch_size=micro,
            gradient_accumulation_steps=accumulation,
            save_interval=None,
        )
        trainer.train()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]))
    for other in weights[1:]:
        torch.testing.assert_close(
            other, weights[0], rtol=0, atol=1e-4
        )  # a step moves each weight by up to 1e-2


def test_bf16_follows_fp32_closely(tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        tiny_run(tmp_path / precision, model={"dropout": 0.0}, precision=precision, save_interval=None)
        losses[precision] = [line["loss"] for line in read_metrics(tmp_path / precision) if "loss" in line]
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=0.02)


def test_without_a_validation_split_the_error_tells_how_to_get_one(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    trainer = Trainer(tiny_model(config.model), config, tokens(), console=Console(quiet=True))
    with pytest.raises(UsageError, match="val_ratio"):
        trainer.evaluate()


def test_data_shorter_than_a_window_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fewer than one window"):
        tiny_trainer(tmp_path / "run", data=tokens(5))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", ["meta", "xpu", "cuda:99", "no such"])
def test_a_device_that_cannot_train_is_refused_before_anything_is_moved(tmp_path: Path, device: str) -> None:
    tiny_run(tmp_path, max_steps=2)
    there = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UsageError, match=f"device '{device}'"):
        tiny_run(tmp_path, device=device)
    assert sorted(path.name for path in tmp_path.iterdir()) == there
