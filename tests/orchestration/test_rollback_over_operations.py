"""A loss spike after an operation rolls the run back to before it: the old shape, the old position in the
schedule.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from spiking_run import Rates, spiking

from llm_trainer.config.schema.scaling_schedule import Operation
from llm_trainer.diagnostics.verify_resume import StopAtStep, compare_checkpoints
from llm_trainer.orchestration.orchestrator import Orchestrator
from llm_trainer.training.callbacks.callback import Callback
from llm_trainer.training.run import TrainingRun
from llm_trainer.training.trainer import Trainer


class Depths(Callback):
    """How many layers the model had in each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_step_end(self, run: TrainingRun, step: int) -> None:
        self.seen.append((step, run.model.config.num_hidden_layers))


def growing(folder: Path, *callbacks: Callback, **settings: object) -> tuple[Trainer, list[str]]:
    """Two layers become four at step 5 and the batches half as large at step 6; steps 19 to 22 spike the
    first time they come.
    """
    schedule = [
        Operation(name="stack_layers", value=[0, 0, 1, 1], max_wait_iters=5),
        Operation(name="change_batch_size", value=0.5, max_wait_iters=1),
    ]
    return spiking(folder, 13, 14, *callbacks, Orchestrator(schedule), spike_rollback_steps=14, **settings)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_rollback_restores_the_old_shape_and_the_operations_fire_again(
    tmp_path: Path, optimizer: str
) -> None:
    depths = Depths()
    trainer, lines = growing(tmp_path, depths, optimizer=optimizer)
    assert trainer.train().step == 24
    assert any("loss spike at step 19" in line and "rolled back to step 3 " in line for line in lines), lines
    first, second = depths.seen[:20], depths.seen[20:]
    assert first == [(step, 2 if step <= 5 else 4) for step in range(1, 21)]
    assert second == [(step, 2 if step <= 5 else 4) for step in range(4, 25)]
    assert trainer.run.state.samples == 104 + 3 * 8 + 18 * 4
    entries = [
        json.loads(line) for line in (tmp_path / "operations.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [(entry["operation"], entry["step"]) for entry in entries] == [
        ("stack_layers", 5),
        ("change_batch_size", 6),
    ]


@pytest.mark.parametrize("stop", [19, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (12, 20, 22))])
def test_interrupted_around_the_rollback_the_run_ends_as_the_uninterrupted_one(
    tmp_path: Path, stop: int
) -> None:
    growing(tmp_path / "straight")[0].train()
    growing(tmp_path / "cut", StopAtStep(stop))[0].train()
    growing(tmp_path / "cut", resume_from="auto")[0].train()
    assert compare_checkpoints(tmp_path / "straight/final_model", tmp_path / "cut/final_model") == []


def test_a_warm_up_doubled_by_an_operation_is_doubled_once_after_a_rollback(tmp_path: Path) -> None:
    longer = Operation(name="change_warmup_iters", value=2, max_wait_iters=5)
    trainer, lines = spiking(
        tmp_path, 13, 14, Orchestrator([longer]), spike_rollback_steps=10, warmup_steps=4
    )
    trainer.train()
    assert any("rolled back to step 3 " in line for line in lines), lines
    assert trainer.run.state.schedule is not None
    assert trainer.run.state.schedule.warmup_steps == 8


def extended(
    folder: Path, fired: Operation, *callbacks: Callback, **settings: object
) -> tuple[Trainer, list[str]]:
    """A run of 12 steps that is extended to 24, changed at step 13, and rolled back at a spike (step 19) to
    where it was resumed.
    """
    ends = {"max_steps": 24} if "num_epochs" not in settings else {}
    schedule = [fired]
    spiking(folder, 100, 100, Orchestrator(schedule), max_steps=12)[0].train()
    more = {"resume_from": str(folder), "lr_on_resume": "extend", "spike_rollback_steps": 7} | ends | settings
    return spiking(folder, 19, 20, *callbacks, Orchestrator(schedule), **more)


@pytest.mark.parametrize("name", ["stack_layers", "set_eval_interval"])
def test_a_rollback_to_before_the_end_was_moved_keeps_the_new_end_and_its_rates(
    tmp_path: Path, name: str
) -> None:
    rates = Rates()
    operation = Operation(name=name, value=[0, 0, 1, 1] if name == "stack_layers" else 50, max_wait_iters=13)
    trainer, lines = extended(tmp_path, operation, rates)
    assert trainer.train().step == 24
    assert any("loss spike at step 19" in line and "rolled back to step 12 " in line for line in lines), lines
    first, second = dict(rates.seen[:8]), dict(rates.seen[8:])
    assert list(first) == list(range(13, 21))
    assert list(second) == list(range(13, 25))
    assert all(second[step] == rate for step, rate in first.items())


def test_a_rollback_to_before_other_batches_keeps_a_moved_end_in_epochs(tmp_path: Path) -> None:
    """4.8 epochs are 192 samples: 24 steps of 8."""
    halved = Operation(name="set_grad_accum", value=1, max_wait_iters=13)
    trainer, lines = extended(tmp_path, halved, max_steps=None, num_epochs=4.8, spike_rollback_steps=12)
    assert trainer.train().step == 13 + 2 * 11
    assert any("loss spike at step" in line and "rolled back to step 12 " in line for line in lines), lines


def test_a_rollback_to_the_best_model_runs_the_operations_that_were_pending_there(tmp_path: Path) -> None:
    """The best model is saved in the validation at step 8, before the entry that its loss triggers is
    judged.
    """
    depths = Depths()
    operation = Operation(name="stack_layers", value=[0, 0, 1, 1], trigger_loss=1e9, max_wait_iters=None)
    waits = Operation(name="set_eval_interval", value=8, max_wait_iters=1)
    settings = {"save_interval": 100, "eval_interval": 8, "spike_rollback_steps": 4, "max_steps": 16}
    trainer, lines = spiking(tmp_path, 14, 15, depths, Orchestrator([waits, operation]), **settings)
    trainer.train()
    assert any("rolled back to step 8 " in line and "best_model" in line for line in lines), lines
    assert [layers for step, layers in depths.seen if step == 9] == [4, 4]
    assert not trainer.run.state.between_steps_pending
