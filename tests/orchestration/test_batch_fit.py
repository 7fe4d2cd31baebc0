"""`adjust_batch_size`: the micro-batch that memory holds, the same step in all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_run import tiny_config, tiny_model, tokens

from llm_trainer.config import RunConfig, UsageError
from llm_trainer.config.resolve.batch_size import BatchPlan
from llm_trainer.config.schema.scaling_schedule import Operation, read_schedule
from llm_trainer.diagnostics.verify_resume import StopAtStep
from llm_trainer.orchestration.orchestrator import Orchestrator
from llm_trainer.training.logging.metrics import read_metrics
from llm_trainer.training.trainer import Trainer

WIDE = {
    "vocab_size": 20_000,
    "max_position_embeddings": 64,
    "hidden_size": 4,
    "num_layers": 1,
    "dropout": 0.0,
}
# The logits of a sequence are 5 MB, kept a few times; nothing else needs much memory.


def adjusted(
    folder: Path, value: object, *, spare: float = 1000.0, micro: int = 2, **settings: Any
) -> Trainer:
    """A run whose operation fires after its first step with so many GB of memory to spare."""
    base = {
        "micro_batch_size": micro,
        "batch_size": 8,
        "gradient_accumulation_steps": None,
        "loss": "dense",
        "max_steps": 2,
    }
    config = tiny_config(folder, WIDE, **base | {"warmup_steps": 0} | settings)
    schedule = [Operation(name="adjust_batch_size", value=value, max_wait_iters=1)]
    trainer = Trainer(
        tiny_model(config.model),
        config,
        tokens(64 * 40 + 1),
        callbacks=[Orchestrator(schedule)],
        console=Console(quiet=True),
    )
    trainer.run.monitor.machine.memory_budget = lambda ranks: (
        trainer.run.monitor.machine.memory_in_use() + int(spare * 1e9)
    )  # type: ignore[method-assign]
    return trainer


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


@pytest.mark.parametrize(
    ("value", "plan"),
    [
        (None, BatchPlan(8, 1)),
        (0.9, BatchPlan(8, 1)),
        ({"max_batch_size": 5}, BatchPlan(4, 2)),
        ({"target_vram_percent": 80}, BatchPlan(8, 1)),
    ],
)
def test_with_memory_to_spare_the_micro_batch_grows_up_to_the_bound(
    tmp_path: Path, value: object, plan: BatchPlan
) -> None:
    trainer = adjusted(tmp_path / "adjusted", value)
    trainer.train()
    assert (trainer.run.batches, trainer.run.state.samples) == (plan, 16)
    plain = adjusted(tmp_path / "plain", None, max_steps=1)
    plain.train()  # ends before its operation
    assert losses(tmp_path / "adjusted")[0] == losses(tmp_path / "plain")[0]


@pytest.mark.slow
def test_the_micro_batch_is_the_one_that_the_finder_finds(tmp_path: Path) -> None:
    trainer = adjusted(tmp_path / "adjusted", 1.0, spare=0.08, micro=8)
    trainer.train()
    assert 1 < trainer.run.batches.micro_batch_size < 8
    assert trainer.run.batches == trainer.run.largest_micro_batch(fraction=1.0)
    unchanged = adjusted(tmp_path / "at_once", 1.0, micro=8)
    unchanged.train()
    assert unchanged.run.batches == BatchPlan(8, 1)
    assert losses(tmp_path / "adjusted") == pytest.approx(losses(tmp_path / "at_once"), rel=1e-5)


def test_where_not_even_one_sequence_fits_the_run_continues_with_one_and_logs_it(tmp_path: Path) -> None:
    trainer = adjusted(tmp_path, None, spare=-1.0, file_logging=True)
    trainer.train()
    assert (trainer.run.batches, trainer.run.state.step) == (BatchPlan(1, 8), 2)
    assert "not even micro_batch_size 1 fits" in (tmp_path / "logs" / "train.log").read_text(encoding="utf-8")


def test_bounds_that_divide_nothing_do_not_end_the_run(tmp_path: Path) -> None:
    plain = adjusted(tmp_path, {"max_batch_size": 7}, file_logging=True)
    bounds = {"use_adaptive_batch_size": True, "min_batch_size": 5, "max_batch_size": 8}
    training = plain.run.training.model_dump() | {"use_computational_efficiency": True, "micro_batch_size": 8}
    config = RunConfig(
        model=plain.run.config.model.model_dump(), training=training, computational_efficiency=bounds
    )
    trainer = Trainer(
        tiny_model(config.model),
        config,
        tokens(64 * 40 + 1),
        callbacks=plain.callbacks,
        console=Console(quiet=True),
    )
    trainer.train()
    assert (trainer.run.batches, trainer.run.state.step) == (BatchPlan(8, 1), 2)
    assert "adjust_batch_size changes nothing" in (tmp_path / "logs" / "train.log").read_text(
        encoding="utf-8"
    )


@pytest.mark.slow
def test_a_resumed_run_keeps_the_size_that_was_found(tmp_path: Path) -> None:
    first = adjusted(tmp_path / "run", {"max_batch_size": 4}, max_steps=4, save_interval=1)
    first.callbacks.append(StopAtStep(2))
    first.train()
    second = adjusted(
        tmp_path / "run",
        {"max_batch_size": 4},
        max_steps=4,
        save_interval=1,
        resume_from=str(tmp_path / "run"),
    )
    second.train()
    whole = adjusted(tmp_path / "whole", {"max_batch_size": 4}, max_steps=4)
    whole.train()
    assert second.run.batches == whole.run.batches == BatchPlan(4, 2)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    "value",
    [
        "0",
        "1.5",
        "true",
        "{}",
        "{max_batch_size: 0}",
        "{max_batch_size: 2.5}",
        "{target_vram_percent: 0}",
        "{target_vram_percent: 120}",
    ],
)
def test_a_meaningless_value_is_refused_before_training(tmp_path: Path, value: str) -> None:
    path = tmp_path / "schedule.yaml"
    path.write_text(f"- {{name: adjust_batch_size, value: {value}, max_wait_iters: 1}}\n", encoding="utf-8")
    with pytest.raises(UsageError, match="adjust_batch_size"):
        read_schedule(path, layers=1)
