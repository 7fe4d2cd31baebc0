"""A loss spike after an operation takes the run back to before the operation: the old shape, the old place in the schedule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_spikes import spiking

from llm_trainer.config.schedules import Operation
from llm_trainer.orchestration.orchestrator import Orchestrator
from llm_trainer.training.callbacks import Callback
from llm_trainer.training.replay import StopAt, compare_checkpoints
from llm_trainer.training.trainer import Trainer


class Depths(Callback):
    """How many layers the model had in each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_step_end(self, trainer: Trainer, step: int) -> None:
        self.seen.append((step, trainer.model.config.num_hidden_layers))


def growing(folder: Path, *callbacks: Callback, **settings: object) -> tuple[Trainer, list[str]]:
    """Two layers become four at step 5 and the batches half as large at step 6; steps 19 to 22 spike the first time they come."""
    schedule = [
        Operation(name="stack_layers", value=[0, 0, 1, 1], max_wait_iters=5),
        Operation(name="change_batch_size", value=0.5, max_wait_iters=1),
    ]
    return spiking(folder, 13, 14, *callbacks, Orchestrator(schedule), spike_distance=14, **settings)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_model_shrinks_to_what_it_was_and_the_operations_fire_again(tmp_path: Path, optimizer: str) -> None:
    depths = Depths()
    trainer, said = growing(tmp_path, depths, optimizer=optimizer)
    assert trainer.train().step == 24
    assert any("loss spike at step 19" in line and "back at step 3 " in line for line in said), said
    first, second = depths.seen[:20], depths.seen[20:]
    assert first == [(step, 2 if step <= 5 else 4) for step in range(1, 21)]
    assert second == [(step, 2 if step <= 5 else 4) for step in range(4, 25)]
    assert trainer.state.samples == 104 + 3 * 8 + 18 * 4
    entries = [json.loads(line) for line in (tmp_path / "operations.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(entry["operation"], entry["step"]) for entry in entries] == [("stack_layers", 5), ("change_batch_size", 6)]


@pytest.mark.parametrize("stop", [12, 19, 20, 22])
def test_interrupted_around_it_the_run_ends_as_the_uninterrupted_one(tmp_path: Path, stop: int) -> None:
    growing(tmp_path / "straight")[0].train()
    growing(tmp_path / "cut", StopAt(stop))[0].train()
    growing(tmp_path / "cut", resume_from="auto")[0].train()
    assert compare_checkpoints(tmp_path / "straight/final_model", tmp_path / "cut/final_model") == []
