"""Resuming a run, in one file: which checkpoint, which settings may change, where the run then ends.

A start goes through these functions in this order:

1. `find_checkpoint`: fetch from remote storage if need be, search, verify on all ranks together.
2. `read_resumption`: compare the saved settings and data with those of now, and plan the rest of the run.
3. `TrainingRun.resume` (training/run.py) applies it: shape, weights, optimizers, state, callbacks.

Learning rates, intervals, batch size and paths may change, and each change is printed, old → new. Shape,
optimizer, seed, tokenizer and data are what the saved state depends on: changing them is another run that
starts from these weights, and the error says how. A moved end would silently bend a decay that was aimed at
the old one, so the user says what is meant (`--lr_on_resume`), unless the decay has a length of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from llm_trainer.config import CheckpointError, RunConfig, TrainingConfig, UsageError
from llm_trainer.config.saved_run import read_run_config
from llm_trainer.data.sampling.batch import Sampler
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.distributed.process_group import ProcessGroup
from llm_trainer.run_dir import JSON, Report, Verify, list_checkpoints, resolve_resume_folder, verify
from llm_trainer.training.checkpoint.distributed_resume import find_together
from llm_trainer.training.checkpoint.remote import fetch_checkpoint, is_address, with_local_folders
from llm_trainer.training.checkpoint.store import read_state
from llm_trainer.training.optim.lr_schedule import LRSchedule, LRScheduleState, RunLength
from llm_trainer.training.state import RunOverrides, TrainingState

# Settings of the model that are not its shape.
_NOT_SHAPE = {
    "dropout",
    "attention_dropout",
    "embedding_dropout",
    "initializer_range",
    "gradient_checkpointing",
    "activation_checkpoint_every",
    "activation_checkpoint_policy",
}
_FIXED_IN_TRAINING = {
    "optimizer": "the saved optimizer state belongs to another optimizer",
    "seed": "the order of the data depends on it",
    "init_from": None,  # set at every start
    "resume_from": None,
    "lr_on_resume": None,
}
_BATCH_SETTINGS = {
    f"training.{name}" for name in ("batch_size", "micro_batch_size", "gradient_accumulation_steps")
}
_LENGTH_SETTINGS = {"training.max_steps", "training.num_epochs", "training.max_tokens"}


# 1. Which checkpoint.


def find_checkpoint(
    training: TrainingConfig, process_group: ProcessGroup, log: Callable[[str], None]
) -> tuple[TrainingConfig, Path | None]:
    """Find and verify the checkpoint that the settings ask for. A collective call, once per start.

    `resume_from: auto` is the newest checkpoint of output_dir, if there is one. nanoGPT's `init_from: resume`
    demands one.

    Args:
        training: The settings `output_dir`, `remote_dir`, `resume_from` and `init_from`. Not changed.
        process_group: The ranks that train together.
        log: Called with each line for the user.

    Returns:
        The settings with local folders in place of remote addresses, and the verified checkpoint folder, or
        None for a new run.

    Raises:
        CheckpointError: If what is named does not exist or is damaged.
        UsageError: If a remote address cannot be reached.
    """
    training = with_local_folders(training)
    if training.remote_dir is not None or is_address(training.resume_from):
        start = training
        training = process_group.main_process_first(lambda: fetch_checkpoint(start, log))
    name = training.resume_from
    if name is None and training.init_from == "resume":
        name = training.output_dir
    if name is None:
        return training, None
    spec, run_dir = name, Path(training.output_dir)
    return training, find_together(process_group, lambda check: resume_folder(spec, run_dir, log, check))


def resume_folder(
    spec: str, run_dir: Path, report: Report | None = None, check: Verify = verify
) -> Path | None:
    """The checkpoint folder that `resume_from` means.

    Args:
        spec: A checkpoint folder, a run folder, or `auto`.
        run_dir: The run folder that `auto` means.
        report: Called with a line for each damaged checkpoint that is passed over.
        check: Verifies a folder and returns what is wrong with it.

    Returns:
        The verified folder, or None if `spec` is `auto` and `run_dir` holds no checkpoint yet.

    Raises:
        CheckpointError: If there is none, or if all of them are damaged: that is not a fresh start.
    """
    if spec != "auto":
        return resolve_resume_folder(spec, report, check)
    return resolve_resume_folder(run_dir, report, check) if list_checkpoints(run_dir) else None


# 2. What may change, and what the rest of the run is.


@dataclass(frozen=True)
class Change:
    """A setting that is not as it was saved."""

    name: str
    old: JSON
    new: JSON

    def __str__(self) -> str:
        return f"{self.name}: {self.old} → {self.new}"


@dataclass(frozen=True)
class ResumePlan:
    """The rest of a resumed run: lines to print, its last step, and its learning rates."""

    lines: list[str]
    total_steps: int
    schedule: LRSchedule
    operations: LRScheduleState


@dataclass(frozen=True)
class Resumption:
    """What a checkpoint gives a resumed run, besides weights and optimizer state.

    Attributes:
        state: The run's state, with what the user has changed since.
        steps: The last step.
        lines: Lines to print.
        scaler: State of the fp16 gradient scaler.
        callbacks: State of each callback, by its class name.
    """

    state: TrainingState
    steps: int
    lines: list[str]
    scaler: dict[str, float | int]
    callbacks: dict[str, dict[str, JSON]]


def read_resumption(
    checkpoint: Path,
    config: RunConfig,
    train_dataset: TokenDataset,
    sampler: Sampler,
    *,
    new_schedule: LRSchedule,
    length: RunLength,
    sequences_per_step: int,
) -> Resumption:
    """Read what a verified checkpoint gives a run with these settings and data.

    Args:
        checkpoint: The checkpoint folder.
        config: The settings of now.
        train_dataset: The training split.
        sampler: The order of its samples.
        new_schedule: The learning-rate schedule that a new run with these settings would have.
        length: The length that a new run would have.
        sequences_per_step: Sequences per step as the settings say.

    Raises:
        UsageError: For a setting that may not change on a resume.
        CheckpointError: For other data, or a state that does not fit.
    """
    changes = compare_settings(read_run_config(checkpoint), config, checkpoint)
    stored = read_state(checkpoint)
    check_same_data(stored.get("data"), train_dataset, sampler, checkpoint)
    state = TrainingState.from_json(stored)
    plan = plan_resume(
        checkpoint=checkpoint,
        state=state,
        changes=changes,
        training=config.training,
        new_schedule=new_schedule,
        length=length,
        sequences_per_step=sequences_per_step,
    )
    changed = {change.name for change in changes}
    state = replace(
        state,
        overrides=_without_what_is_set_now(state.overrides, changed),
        schedule=plan.schedule,
        operations=plan.operations,
        total_steps=plan.total_steps,
        precision=None if "training.precision" in changed else state.precision,
        compile=None if "training.compile" in changed else state.compile,
    )
    scaler = cast("dict[str, float | int]", stored.get("scaler") or {})
    callbacks = cast("dict[str, dict[str, JSON]]", stored.get("callbacks") or {})
    return Resumption(state, plan.total_steps, plan.lines, scaler, callbacks)


def compare_settings(old: RunConfig, new: RunConfig, checkpoint: Path) -> list[Change]:
    """List every setting that a resume changes.

    Raises:
        UsageError: For one that may not change.
    """
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    changes: list[Change] = []
    for section in before:
        for name in before[section]:
            if before[section][name] == after[section][name]:
                continue
            change = Change(f"{section}.{name}", before[section][name], after[section][name])
            if section == "model" and name not in _NOT_SHAPE:
                raise UsageError(
                    f"{change} cannot change on a resume: the weights in {checkpoint} have the old shape; "
                    f"{_start_new_run(checkpoint)}"
                )
            if section == "training" and name in _FIXED_IN_TRAINING:
                if (reason := _FIXED_IN_TRAINING[name]) is None:
                    continue
                raise UsageError(
                    f"{change} cannot change on a resume: {reason}; {_start_new_run(checkpoint)}"
                )
            changes.append(change)
    return changes


def data_identity(train_dataset: TokenDataset, sampler: Sampler) -> dict[str, JSON]:
    """What a checkpoint stores about its data: tokens, tokenizer and order of samples, but no paths.

    Args:
        train_dataset: The training split.
        sampler: The order of its samples.
    """
    return {
        "fingerprint": train_dataset.fingerprint,
        "tokenizer": train_dataset.tokenizer_hash,
        "order": sampler.order,
    }


def check_same_data(stored: JSON, train_dataset: TokenDataset, sampler: Sampler, checkpoint: Path) -> None:
    """Check that a run resumes with the data that it was trained with.

    Raises:
        CheckpointError: For other data, another tokenizer or another order of samples.
    """
    known = stored if isinstance(stored, Mapping) else {}
    now = data_identity(train_dataset, sampler)
    for name, what in (("tokenizer", "another tokenizer"), ("fingerprint", "other data")):
        if known.get(name) not in (None, now[name]):
            raise CheckpointError(
                f"{checkpoint} was trained with {what} than the training split given now; "
                f"{_start_new_run(checkpoint)}"
            )
    if known.get("order") not in (None, now["order"]):
        raise CheckpointError(
            f"{checkpoint} was trained on the samples in the order {known['order']!r}, not {now['order']!r}; "
            "the order depends on packing, the mixture, and the batch size where stages are given in steps; "
            f"{_start_new_run(checkpoint)}"
        )


def plan_resume(
    *,
    checkpoint: Path,
    state: TrainingState,
    changes: Collection[Change],
    training: TrainingConfig,
    new_schedule: LRSchedule,
    length: RunLength,
    sequences_per_step: int,
) -> ResumePlan:
    """Decide where a resumed run ends and how its learning rate continues.

    A length in epochs or tokens counts the samples that were consumed, at whatever batch size, except those
    that a rollback has skipped.

    Args:
        checkpoint: The checkpoint folder, for messages.
        state: The stored state.
        changes: The settings that the resume changes.
        training: The settings of now.
        new_schedule: The learning-rate schedule that a new run with these settings would have.
        length: The length that a new run would have.
        sequences_per_step: Sequences per step as the settings say.

    Raises:
        UsageError: If the end moves and `lr_on_resume` does not say what the decay does.
    """
    assert state.schedule is not None, "a checkpoint's state holds its schedule"
    assert state.total_steps is not None, "a checkpoint's state holds its length"
    changed = {change.name for change in changes}
    by_operation = None if changed & _BATCH_SETTINGS else state.overrides.sequences_per_step
    if by_operation is not None and not changed & _LENGTH_SETTINGS:
        total = state.total_steps
    else:
        now = by_operation or sequences_per_step
        total = _last_step(length, state, training, sequences_per_step, now)
    schedule = _with_changed_settings(state.schedule, new_schedule, changed)
    operations, lines = state.operations, [f"resuming {checkpoint} at step {state.step:,} of {total:,}"]
    lines += [f"  {change}" for change in changes]
    if total != state.total_steps and training.lr_decay_steps is None and schedule.kind != "constant":
        is_set_by_user = bool(changed & _LENGTH_SETTINGS)
        if is_set_by_user and training.lr_on_resume is None:
            raise UsageError(_needs_lr_on_resume(state, total))
        choice = (
            training.lr_on_resume or "extend"
        )  # only the batch size changed: as many samples, in other steps
        schedule, operations = _moved(schedule, operations, state.step, total, choice, training)
        lines.append(
            f"  run extended from step {state.total_steps:,} to {total:,}; {_EFFECTS[choice]}"
            if total > state.total_steps
            else f"  run shortened from step {state.total_steps:,} to {total:,}; {_EFFECTS[choice]}"
        )
    if state.step >= total:
        lines.append(
            f"  the run has ended: nothing is left to train. To continue, set max_steps above {state.step} "
            "and lr_on_resume"
        )
    return ResumePlan(lines, total, schedule, operations)


_EFFECTS = {
    "extend": "the learning-rate decay is stretched to the new end",
    "rewarm": "the learning rate warms up again and decays to the new end",
    "keep": "the learning-rate decay stays as it was",
}


def _without_what_is_set_now(overrides: RunOverrides, changed: Collection[str]) -> RunOverrides:
    """What operations have set, except for what the user sets now."""
    dropped: dict[str, None] = {}
    if _BATCH_SETTINGS & set(changed):
        dropped |= {"micro_batch_size": None, "sequences_per_step": None}
    dropped |= {name: None for name in ("eval_iters", "eval_interval") if f"training.{name}" in changed}
    return replace(overrides, **dropped)  # type: ignore[arg-type]


def _start_new_run(checkpoint: Path) -> str:
    return f"keep it, or start a new run from these weights: --init_from={checkpoint} with another output_dir"


def _last_step(
    length: RunLength,
    state: TrainingState,
    training: TrainingConfig,
    sequences_in_length: int,
    sequences_now: int,
) -> int:
    """The last step. A length in epochs or tokens ends when as many samples have been consumed; what a
    rollback skipped is not included, as it was not when the run rolled back.
    """
    if length.steps == training.max_steps:
        return length.steps
    left = length.steps * sequences_in_length - (state.samples - state.spikes.skipped_samples)
    return state.step + max(0, math.ceil(left / sequences_now))


def _with_changed_settings(
    stored: LRSchedule, new_schedule: LRSchedule, changed: Collection[str]
) -> LRSchedule:
    """The stored schedule with what the user changed: a default that was derived from the old end stays."""
    sources = {
        "kind": {"training.lr_scheduler"},
        "warmup_steps": {"training.warmup_steps"},
        "decay_steps": {"training.lr_decay_steps"},
        "minimum_fraction": {"training.min_learning_rate", "training.learning_rate"},
        "wsd_decay_fraction": {"training.wsd_decay_fraction"},
    }
    updates = {name: getattr(new_schedule, name) for name, names in sources.items() if names & set(changed)}
    return replace(stored, **updates)


def _moved(
    schedule: LRSchedule,
    operations: LRScheduleState,
    step: int,
    total: int,
    choice: str,
    training: TrainingConfig,
) -> tuple[LRSchedule, LRScheduleState]:
    if choice == "keep":
        return schedule, operations
    if choice == "rewarm":
        warmup = schedule.warmup_steps if training.warmup_steps is not None else max(1, (total - step) // 10)
        return replace(schedule, decay_steps=total, warmup_steps=warmup), replace(operations, offset=step)
    return replace(schedule, decay_steps=total), operations


def _needs_lr_on_resume(state: TrainingState, total: int) -> str:
    return (
        f"the end of the run moves from step {state.total_steps} to {total}, and its learning rate was "
        "decaying towards the old end; set --lr_on_resume to extend (stretch the decay to the new end), "
        "rewarm (warm up again from here and decay to the new end) or keep (the old decay, then its lowest "
        "rate), or give the decay a length of its own with --lr_decay_iters"
    )
