"""The engine can replace the model that it trains, and releases the old one."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import tiny_trainer

from llm_trainer.config import UsageError
from llm_trainer.diagnostics.verify_resume import compare_checkpoints
from llm_trainer.model.surgery.depth import stack_layers
from llm_trainer.training.callbacks.callback import Callback
from llm_trainer.training.run import TrainingRun


class RebuildAsItWas(Callback):
    """Extracts the model's state and rebuilds the same model, after one step."""

    def on_step_end(self, run: TrainingRun, step: int) -> None:
        if step == 3:
            run.engine.rebuild(run.engine.model_state())


@pytest.mark.parametrize(
    "settings",
    [{}, {"optimizer": "muon"}, pytest.param({"compile": "on"}, marks=pytest.mark.slow)],
    ids=["adamw", "muon", "compiled"],
)
def test_a_run_whose_engine_is_rebuilt_is_the_same_bit_exactly(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    tiny_trainer(tmp_path / "straight", max_steps=5, **settings).train()
    tiny_trainer(tmp_path / "rebuilt", max_steps=5, **settings, callbacks=[RebuildAsItWas()]).train()
    assert compare_checkpoints(tmp_path / "straight/final_model", tmp_path / "rebuilt/final_model") == []


class Grow(Callback):
    """Doubles the depth after one step, and watches the old model."""

    def __init__(self) -> None:
        self.old: list[weakref.ref[object]] = []

    def on_step_end(self, run: TrainingRun, step: int) -> None:
        if step != 2:
            return
        engine = run.engine
        held = [engine.model, engine.model.blocks[0], engine.optimizers[0]]
        held += [parameter for parameter in engine.model.parameters()]
        held += [value for kept in engine.optimizers[0].state.values() for value in kept.values()]
        self.old = [weakref.ref(one) for one in held]
        del held
        engine.rebuild(stack_layers(engine.model_state(), [0, 0, 1, 1]))
        gc.collect()

    def left(self) -> int:
        return sum(one() is not None for one in self.old)


@pytest.mark.parametrize("compile_mode", ["off", pytest.param("on", marks=pytest.mark.slow)])
def test_nothing_of_the_old_model_remains(tmp_path: Path, compile_mode: str) -> None:
    grow = Grow()
    trainer = tiny_trainer(tmp_path, max_steps=4, compile=compile_mode, callbacks=[grow])
    trainer.train()
    gc.collect()
    assert len(grow.old) > 20
    assert grow.left() == 0
    assert trainer.model.config.num_hidden_layers == 4


def test_a_frozen_part_does_not_move_and_its_state_is_kept(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=2)
    trainer.train()
    engine = trainer.run.engine
    form = engine.model_state()
    name = "blocks.0.mlp.up_proj.weight"
    engine.rebuild(replace(form, frozen=frozenset({name})))
    rested = engine.model_state()
    assert rested.frozen == {name}
    assert torch.equal(rested.optimizer_state[name]["exp_avg"], form.optimizer_state[name]["exp_avg"])
    with pytest.raises(UsageError, match="every parameter is frozen"):
        engine.rebuild(replace(form, frozen=frozenset(form.weights)))
