"""Where a run stands is taken from a checkpoint: at its start, when it goes on, and in its middle, when it
goes back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.config import RunConfig
from llm_trainer.config.resolve.batch_size import resolve_batches
from llm_trainer.run_dir import BEST_MODEL, JSON, verify
from llm_trainer.training.changes import take_batches, take_shape
from llm_trainer.training.checkpoint.atomic_fs import copy_checkpoint
from llm_trainer.training.checkpoint.resume import Resumption, read_resumption
from llm_trainer.training.checkpoint.store import read_state, restore, restore_generators
from llm_trainer.training.engines.validation import ValidationResult
from llm_trainer.training.optim.lr_schedule import resolve_length, resolve_schedule

if TYPE_CHECKING:
    from llm_trainer.training.trainer import Trainer

Scaler = dict[str, float | int]


def take_up(trainer: Trainer, path: Path) -> Scaler:
    """Go on from a verified checkpoint, as far as the settings of now allow, and tell what has changed;
    returns fp16's scaler's state.

    Raises UsageError and CheckpointError as `read_resumption` does. A collective call.
    """
    resumed = _read(trainer, path, trainer.config)
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
    """Stand where a verified checkpoint of this very run was saved, as if resumed there with the settings of
    now: operations since then are undone, and what a person has said since then (a later end, say) holds. A
    collective call.
    """
    now, horizon = trainer.state, trainer.training.horizon
    if horizon is None:  # of a resume before this one, by what became of it
        assert now.schedule is not None
        horizon = "extend" if now.schedule.decay_steps == now.total_steps else "keep"
    training = trainer.training.model_copy(update={"horizon": horizon})
    resumed = _read(trainer, path, trainer.config.model_copy(update={"training": training}))
    take_shape(trainer.engine, path, resumed.state.changes)
    trainer.engine.load(lambda model, optimizers: restore(path, model, optimizers, verified=True))
    trainer.state = replace(resumed.state, seconds=now.seconds, precision=now.precision, compile=now.compile)
    trainer.length = replace(trainer.length, steps=resumed.steps)
    take_batches(trainer)
    trainer.engine.precision.load_state_dict(resumed.scaler)
    _give_callbacks(trainer, resumed.callbacks)
    restore_generators(path, trainer.ranks)


def goes_on_here(trainer: Trainer) -> bool:
    """Whether the checkpoint that the run goes on from is of its own run folder."""
    return (
        trainer.resumed_from is not None
        and trainer.resumed_from.parent.resolve() == trainer.run_dir.resolve()
    )


def settle_best(trainer: Trainer, moved: str, *, begins: bool) -> None:
    """Once the run folder is this run's: the lowest loss so far is one whose model is there, or is yet to be
    found. A collective call.

    `moved`: where what the run does not go on from lies now, if there was any; `begins`: whether the run begins in this folder. Where it
    goes on from another folder's checkpoint, that folder's best model comes along.
    """
    state, ranks = trainer.state, trainer.ranks
    if begins and state.best_validation_loss is not None:
        brought = ranks.of_main(ranks.main_does(lambda: _bring_best(trainer)) or "")
        if not brought:
            state.best_validation_loss = None
    elif moved and (Path(moved) / BEST_MODEL).exists():
        state.best_validation_loss = None  # the best of this line of the run is gone


def best_beside(checkpoint: Path, *, contents: bool = True) -> Path | None:
    """The whole best model in a checkpoint's run folder, where it is the best of the steps up to this
    checkpoint.

    `contents=False`: by its files' sizes, nothing is read.
    """
    best = checkpoint.parent / BEST_MODEL
    if not best.is_dir() or verify(best, contents=contents):
        return None
    known, found = read_state(checkpoint), read_state(best)
    step, steps = found.get("step"), known.get("step")
    is_before = isinstance(step, int) and isinstance(steps, int) and step <= steps
    return (
        best if is_before and found.get("best_validation_loss") == known.get("best_validation_loss") else None
    )


def _bring_best(trainer: Trainer) -> str:
    """The best model's new place, or nothing where the run that the checkpoint is of has none that counts."""
    best = best_beside(trainer.resumed_from, contents=False) if trainer.resumed_from is not None else None
    if best is None:
        return ""
    place = trainer.run_dir / BEST_MODEL
    trainer.say(f"copying {best}, the best model so far, to {place}")
    if problems := copy_checkpoint(best, place):  # judged by the copy, so that its files are read once
        trainer.say(f"passing over {best}: {'; '.join(problems[:3])}")
        return ""
    if trainer.store.remote is not None:
        trainer.store.remote.upload_later(BEST_MODEL)
    return str(place)


def end_edge(trainer: Trainer) -> None:
    """Do what was still to come between two steps, where a checkpoint is from the middle of that (the best
    model). A collective call.
    """
    state = trainer.state
    if state.before_operations:
        state.before_operations = False
        last = state.last_validation_loss
        trainer.between_steps(None if last is None else ValidationResult.of_loss(last))


def _read(trainer: Trainer, path: Path, config: RunConfig) -> Resumption:
    """What the checkpoint gives to a run of these settings, whatever operations have made of the trainer's
    own since.
    """
    training, ranks = config.training, trainer.ranks.data_count
    sequences = resolve_batches(training, ranks).sequences_per_step(ranks)
    length = resolve_length(
        training,
        samples_per_epoch=trainer.sampler.samples_per_epoch,
        sequences_per_step=sequences,
        context=trainer.context,
    )
    return read_resumption(
        path, config, trainer.train_tokens, trainer.sampler,
        resolved=resolve_schedule(training, length), length=length, sequences_per_step=sequences,
    )  # fmt: skip


def _give_callbacks(trainer: Trainer, states: Mapping[str, dict[str, JSON]]) -> None:
    for callback in trainer.callbacks:
        if type(callback).__name__ in states:
            callback.load_state_dict(states[type(callback).__name__])
