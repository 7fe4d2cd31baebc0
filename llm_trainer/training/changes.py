"""Changing a run while it goes on: its model, its batches, its rates. What was changed is in the state, and
so in every checkpoint.

The settings that a person said stay as said (run.json); `TrainingState.changes` lies over them. The shape
that a model has grown to is in the checkpoint's own config.json, and a run that goes on takes it from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.config import UsageError
from llm_trainer.config.resolve.batch_size import BatchPlan, resolve_batches
from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.model.hf.checkpoint import empty_model, read_config
from llm_trainer.model.hf.config import resolved
from llm_trainer.model.surgery.model_state import Form, form_of
from llm_trainer.training.engines.engine import Engine, frozen_names
from llm_trainer.training.optim.lr_schedule import ScheduleState
from llm_trainer.training.state import RunChanges

if TYPE_CHECKING:
    from llm_trainer.training.trainer import Trainer

# What operations may change of a shape.
_GROWN = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size",
    "mlp_widths", "kv_head_counts", "lora", "lora_in_use", "attn_lora_rank", "mlp_lora_rank", "embedding_lora_rank", "head_lora_rank",
)  # fmt: skip


def restructure(trainer: Trainer, change: Callable[[Form], Form]) -> None:
    """Train what `change` makes of the model from here on. All ranks call this at a step's edge. Raises what
    `change` raises.
    """
    engine = trainer.engine
    engine.rebuild(change(engine.form()))
    frozen = frozen_names(engine.model)
    resting = sorted(frozen & _held_names(engine))
    state = trainer.state
    state.changes = replace(state.changes, frozen=sorted(frozen), resting=resting)
    state.spikes = state.spikes.afresh()  # losses of another model are no measure
    trainer.meter.flops_per_token = trainer.count_arithmetic()


def change_batches(trainer: Trainer, plan: BatchPlan) -> None:
    """Go on with other batches. A run whose length is in epochs or tokens ends after as many samples as
    before, in other steps.
    """
    state, before, after = (
        trainer.state,
        trainer.sequences_per_step,
        plan.sequences_per_step(trainer.ranks.data_count),
    )
    state.changes = replace(state.changes, micro_batch_size=plan.micro_batch_size, sequences_per_step=after)
    if after != before and trainer.length.steps != trainer.training.max_steps:
        total = state.step + math.ceil((trainer.length.steps - state.step) * before / after)
        if trainer.training.lr_decay_steps is None and state.schedule is not None:
            state.schedule = replace(state.schedule, decay_steps=total)
        state.total_steps = total
        trainer.length = replace(trainer.length, steps=total)
    take_batches(trainer)
    trainer.restart_batches()


def change_rates(trainer: Trainer, *, learning_rate: float, warmup_steps: int, restart: bool) -> None:
    """Another peak rate and warm-up; `restart`: warm-up and decay begin again here."""
    state, said = trainer.state, trainer.training.learning_rate
    assert state.schedule is not None
    factor = learning_rate / said if said else state.operations.factor
    state.operations = ScheduleState(factor, state.step if restart else state.operations.offset)
    state.schedule = replace(state.schedule, warmup_steps=warmup_steps)


def take_batches(trainer: Trainer) -> None:
    """Let the trainer's batches be what the settings say and the state's changes lay over them. Raises
    UsageError where ranks do not divide them, or the engine cannot run a step divided so.
    """
    changes, ranks, before, length = (
        trainer.state.changes,
        trainer.ranks.data_count,
        trainer.sequences_per_step,
        trainer.length,
    )
    if changes.sequences_per_step is None or changes.micro_batch_size is None:
        trainer.batches = resolve_batches(trainer.training, ranks)
    else:
        trainer.batches = _divided(changes.sequences_per_step, changes.micro_batch_size, ranks)
    trainer.engine.check_batches(trainer.batches)
    after = trainer.sequences_per_step = trainer.batches.sequences_per_step(ranks)
    if after != before:
        tokens = length.tokens_per_step * after // before
        trainer.length = replace(
            length, steps_per_epoch=length.steps_per_epoch * before / after, tokens_per_step=tokens
        )


def take_shape(engine: Engine, checkpoint: Path, changes: RunChanges) -> None:
    """Make the engine's model one that the checkpoint's weights and optimizer state fit, where operations had
    changed that.
    """
    now, then = resolved(engine.model.config), resolved(read_config(checkpoint))
    grown = {name: getattr(then, name) for name in _GROWN if getattr(then, name) != getattr(now, name)}
    frozen = frozenset(engine.frozen_at_first if changes.frozen is None else changes.frozen)
    if not grown and frozen == frozen_names(engine.model) and _held_names(engine).issuperset(changes.resting):
        return
    shape = engine.model.config.model_copy(update=_as_one(grown, then))
    form = form_of(empty_model(shape))
    engine.rebuild(replace(form, state={name: {} for name in changes.resting}, frozen=frozen))


def _held_names(engine: Engine) -> frozenset[str]:
    """Parameters that the optimizers hold: those that are trained, and those whose state rests."""
    held = {
        id(one)
        for optimizer in engine.optimizers
        for group in optimizer.param_groups
        for one in group["params"]
    }
    return frozenset(name for name, parameter in engine.model.named_parameters() if id(parameter) in held)


def _as_one(grown: dict[str, object], then: ModelConfig) -> dict[str, object]:
    """What has grown, with all that a width depends on where one of it did."""
    return {name: getattr(then, name) for name in _GROWN} if grown else {}


def _divided(sequences: int, micro_batch_size: int, ranks: int) -> BatchPlan:
    if sequences % ranks:
        raise UsageError(
            f"an operation has set {sequences} sequences a step, which {ranks} ranks do not divide; start another number of them"
        )
    mine = sequences // ranks
    largest = next(size for size in range(min(micro_batch_size, mine), 0, -1) if mine % size == 0)
    return BatchPlan(largest, mine // largest)
