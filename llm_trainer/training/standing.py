"""Where a run stands is taken from a checkpoint: at its start, when it goes on, and in its middle, when it goes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from llm_trainer.config.run_folder import JSON
from llm_trainer.training.changes import take_batches, take_shape
from llm_trainer.training.checkpoints import read_state, restore, restore_generators
from llm_trainer.training.resume import read_resumption
from llm_trainer.training.state import TrainingState

if TYPE_CHECKING:
    from llm_trainer.training.trainer import Trainer

Scaler = dict[str, float | int]


def take_up(trainer: Trainer, path: Path) -> Scaler:
    """Go on from a verified checkpoint, as far as the settings of now allow, and tell what has changed; returns fp16's scaler's state.

    Raises UsageError and CheckpointError as `read_resumption` does. A collective call.
    """
    assert trainer.state.schedule is not None
    resumed = read_resumption(
        path, trainer.config, trainer.train_tokens, trainer.sampler,
        resolved=trainer.state.schedule, length=trainer.length, sequences_per_step=trainer.sequences_per_step,
    )  # fmt: skip
    take_shape(trainer.engine, path, resumed.state.changes)
    trainer.engine.load(lambda model, optimizers: restore(path, model, optimizers, verified=True))
    for line in resumed.lines:
        trainer.say(line)
    trainer.state = resumed.state
    trainer.length = replace(trainer.length, steps=resumed.steps)
    take_batches(trainer)
    _give_callbacks(trainer, resumed.callbacks)
    return resumed.scaler


def go_back(trainer: Trainer, path: Path) -> None:
    """Stand where a verified checkpoint of this very run was saved; its length and schedule stay what they are. A collective call."""
    now, then = trainer.state, TrainingState.from_json(read_state(path))
    take_shape(trainer.engine, path, then.changes)
    kept = trainer.engine.load(lambda model, optimizers: restore(path, model, optimizers, verified=True))
    if then.changes == now.changes:
        then = replace(then, schedule=now.schedule, total_steps=now.total_steps)
    trainer.state = replace(then, seconds=now.seconds, precision=now.precision, compile=now.compile)
    trainer.length = replace(trainer.length, steps=trainer.state.total_steps or trainer.length.steps)
    take_batches(trainer)
    trainer.engine.precision.load_state_dict(cast("Scaler", kept.get("scaler") or {}))
    _give_callbacks(trainer, cast("dict[str, dict[str, JSON]]", kept.get("callbacks") or {}))
    restore_generators(path, trainer.ranks)


def _give_callbacks(trainer: Trainer, states: Mapping[str, dict[str, JSON]]) -> None:
    for callback in trainer.callbacks:
        if type(callback).__name__ in states:
            callback.load_state_dict(states[type(callback).__name__])
