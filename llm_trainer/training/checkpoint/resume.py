"""What may change when a run goes on, what its learning rate then does, and the proof that going on changed
nothing.

Rates, intervals, batch size and paths may change, and each change is told, old → new. Shape, optimizer, seed,
tokenizer and data are what the saved state is about: to change them is to start another run from these
weights, and the error says how. A moved end would silently bend a decay that was aimed at the old one, so the
person says what is meant (`--horizon`), unless the decay has a length of its own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from llm_trainer.config import CheckpointError, RunConfig, TrainingConfig, UsageError
from llm_trainer.data.sampling.samplers import Sampler
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.run_dir import (
    JSON,
    Report,
    Verify,
    list_checkpoints,
    read_run_config,
    resolve_resume_folder,
    verify,
)
from llm_trainer.training.checkpoint.store import read_state
from llm_trainer.training.optim.lr_schedule import Length, Schedule, ScheduleState
from llm_trainer.training.state import RunChanges, TrainingState

# The model's settings that are not its shape.
_FREE_OF_SHAPE = {
    "dropout",
    "attention_dropout",
    "embedding_dropout",
    "initializer_range",
    "gradient_checkpointing",
    "checkpoint_every",
    "checkpoint_keep",
}
_FIXED_IN_TRAINING = {
    "optimizer": "the saved optimizer state is another optimizer's",
    "seed": "the order of the data follows from it",
    "init_from": None,  # said anew at every start
    "resume_from": None,
    "horizon": None,
}
_SAYS_THE_BATCH = {
    f"training.{name}" for name in ("batch_size", "micro_batch_size", "gradient_accumulation_steps")
}
_SAYS_THE_END = {"training.max_steps", "training.num_epochs", "training.max_tokens"}


@dataclass(frozen=True)
class Change:
    """A setting that is not as it was."""

    name: str
    old: JSON
    new: JSON

    def __str__(self) -> str:
        return f"{self.name}: {self.old} → {self.new}"


@dataclass(frozen=True)
class ResumePlan:
    """How a run goes on: what to tell the person, where it ends, and its rates."""

    lines: list[str]
    total_steps: int
    schedule: Schedule
    operations: ScheduleState


@dataclass(frozen=True)
class Resumption:
    """What a checkpoint gives to the run that goes on from it, beside weights and optimizer; `lines` are to
    be told, `steps` is the end.
    """

    state: TrainingState
    steps: int
    lines: list[str]
    scaler: dict[str, float | int]
    callbacks: dict[str, dict[str, JSON]]


def resume_folder(
    spec: str, run_folder: Path, report: Report | None = None, check: Verify = verify
) -> Path | None:
    """The checkpoint that `resume_from` means, verified by `check`; None when it is `auto` and `run_folder`
    holds none yet.

    A run folder whose checkpoints are all damaged is an error, not a fresh start. Raises CheckpointError.
    """
    if spec != "auto":
        return resolve_resume_folder(spec, report, check)
    return resolve_resume_folder(run_folder, report, check) if list_checkpoints(run_folder) else None


def compare_settings(old: RunConfig, new: RunConfig, checkpoint: Path) -> list[Change]:
    """Every setting that a resume changes. Raises UsageError for one that may not change."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    changes: list[Change] = []
    for section in before:
        for name in before[section]:
            if before[section][name] == after[section][name]:
                continue
            change = Change(f"{section}.{name}", before[section][name], after[section][name])
            if section == "model" and name not in _FREE_OF_SHAPE:
                raise UsageError(
                    f"{change} cannot change on a resume: the weights in {checkpoint} have the old shape; {_new_run(checkpoint)}"
                )
            if section == "training" and name in _FIXED_IN_TRAINING:
                if (reason := _FIXED_IN_TRAINING[name]) is None:
                    continue
                raise UsageError(f"{change} cannot change on a resume: {reason}; {_new_run(checkpoint)}")
            changes.append(change)
    return changes


def data_identity(train: TokenDataset, sampler: Sampler) -> dict[str, JSON]:
    """What a checkpoint remembers of its data: the tokens, the tokenizer and the order of samples, wherever
    the files lie.
    """
    return {"fingerprint": train.fingerprint, "tokenizer": train.tokenizer_hash, "order": sampler.order}


def check_same_data(stored: JSON, train: TokenDataset, sampler: Sampler, checkpoint: Path) -> None:
    """Raises CheckpointError when a run would go on with other data, another tokenizer or another order than
    it was trained with.
    """
    known = stored if isinstance(stored, Mapping) else {}
    now = data_identity(train, sampler)
    for name, what in (("tokenizer", "another tokenizer"), ("fingerprint", "other data")):
        if known.get(name) not in (None, now[name]):
            raise CheckpointError(
                f"{checkpoint} was trained with {what} than the training split given now; {_new_run(checkpoint)}"
            )
    if known.get("order") not in (None, now["order"]):
        raise CheckpointError(
            f"{checkpoint} was trained on the samples in the order {known['order']!r}, not {now['order']!r}; "
            f"packing, mixture, or stages in steps under another batch size decide it; {_new_run(checkpoint)}"
        )


def read_resumption(
    checkpoint: Path,
    config: RunConfig,
    train: TokenDataset,
    sampler: Sampler,
    *,
    resolved: Schedule,
    length: Length,
    sequences_per_step: int,
) -> Resumption:
    """What a verified checkpoint says to a run of these settings and data; `resolved` and `length` as in
    `plan_resume`.

    Raises UsageError and CheckpointError for what may not change, and for what does not fit.
    """
    changes = compare_settings(read_run_config(checkpoint), config, checkpoint)
    kept = read_state(checkpoint)
    check_same_data(kept.get("data"), train, sampler, checkpoint)
    stored = TrainingState.from_json(kept)
    plan = plan_resume(
        checkpoint=checkpoint,
        stored=stored,
        changes=changes,
        training=config.training,
        resolved=resolved,
        length=length,
        sequences_per_step=sequences_per_step,
    )
    changed = {change.name for change in changes}
    state = replace(
        stored,
        changes=_without_what_was_said(stored.changes, changed),
        schedule=plan.schedule,
        operations=plan.operations,
        total_steps=plan.total_steps,
        precision=None if "training.precision" in changed else stored.precision,
        compile=None if "training.compile" in changed else stored.compile,
    )
    scaler = cast("dict[str, float | int]", kept.get("scaler") or {})
    callbacks = cast("dict[str, dict[str, JSON]]", kept.get("callbacks") or {})
    return Resumption(state, plan.total_steps, plan.lines, scaler, callbacks)


def _without_what_was_said(changes: RunChanges, changed: Collection[str]) -> RunChanges:
    """What operations have set, but for what the person sets now."""
    said: dict[str, None] = {}
    if _SAYS_THE_BATCH & set(changed):
        said |= {"micro_batch_size": None, "sequences_per_step": None}
    said |= {name: None for name in ("eval_iters", "eval_interval") if f"training.{name}" in changed}
    return replace(changes, **said)  # type: ignore[arg-type]


def plan_resume(
    *,
    checkpoint: Path,
    stored: TrainingState,
    changes: Collection[Change],
    training: TrainingConfig,
    resolved: Schedule,
    length: Length,
    sequences_per_step: int,
) -> ResumePlan:
    """Where a resumed run ends and how its rates go on.

    `resolved` and `length` are what the settings of now give a new run. A length in epochs or tokens counts the samples that were
    consumed, at whatever batch size, but for those that a rollback has left out. Raises UsageError when the end moves and nothing says what
    the decay does.
    """
    assert stored.schedule is not None, "a checkpoint's state holds its schedule"
    assert stored.total_steps is not None, "a checkpoint's state holds its length"
    changed = {change.name for change in changes}
    by_operation = None if changed & _SAYS_THE_BATCH else stored.changes.sequences_per_step
    if by_operation is not None and not changed & _SAYS_THE_END:
        total = stored.total_steps
    else:
        total = _steps_until_end(
            length, stored, training, sequences_per_step, by_operation or sequences_per_step
        )
    schedule = _with_changed_settings(stored.schedule, resolved, changed)
    operations, lines = stored.operations, [f"resuming {checkpoint} at step {stored.step:,} of {total:,}"]
    lines += [f"  {change}" for change in changes]
    if total != stored.total_steps and training.lr_decay_steps is None and schedule.kind != "constant":
        moved_by_person = bool(changed & _SAYS_THE_END)
        if moved_by_person and training.horizon is None:
            raise UsageError(_needs_horizon(stored, total))
        choice = training.horizon or "extend"  # a changed batch size alone: as many samples, in other steps
        schedule, operations = _moved(schedule, operations, stored.step, total, choice, training)
        lines.append(f"  end: step {stored.total_steps:,} → {total:,}; learning rate: {choice}")
    if stored.step >= total:
        lines.append(
            f"  that is its end: there is nothing left to train; a later end needs max_steps above {stored.step} and --horizon"
        )
    return ResumePlan(lines, total, schedule, operations)


def _new_run(checkpoint: Path) -> str:
    return f"keep it, or start a new run from these weights: --init_from={checkpoint} with another output_dir"


def _steps_until_end(
    length: Length, stored: TrainingState, training: TrainingConfig, said: int, now: int
) -> int:
    """The last step. A length in steps is itself; one in epochs or tokens ends when as many samples have been
    consumed; what a rollback left out does not count, as it did not when the run went back.

    `said` and `now`: sequences a step, as `length` was resolved with, and as they are from here on.
    """
    if length.steps == training.max_steps:
        return length.steps
    left = length.steps * said - (stored.samples - stored.spikes.left_out)
    return stored.step + max(0, math.ceil(left / now))


def _with_changed_settings(stored: Schedule, resolved: Schedule, changed: Collection[str]) -> Schedule:
    """The stored schedule, but for what the person changed: a default that was derived from the old end stays
    as it was.
    """
    said = {
        "kind": {"training.lr_scheduler"},
        "warmup_steps": {"training.warmup_steps"},
        "decay_steps": {"training.lr_decay_steps"},
        "minimum_fraction": {"training.min_learning_rate", "training.learning_rate"},
        "wsd_decay_fraction": {"training.wsd_decay_fraction"},
    }
    return replace(
        stored, **{field: getattr(resolved, field) for field, names in said.items() if names & set(changed)}
    )


def _moved(
    schedule: Schedule,
    operations: ScheduleState,
    step: int,
    total: int,
    choice: str,
    training: TrainingConfig,
) -> tuple[Schedule, ScheduleState]:
    if choice == "keep":
        return schedule, operations
    if choice == "rewarm":
        warmup = schedule.warmup_steps if training.warmup_steps is not None else max(1, (total - step) // 10)
        return replace(schedule, decay_steps=total, warmup_steps=warmup), replace(operations, offset=step)
    return replace(schedule, decay_steps=total), operations


def _needs_horizon(stored: TrainingState, total: int) -> str:
    return (
        f"the run's end moves from step {stored.total_steps} to {total}, and its learning rate was decaying towards the old one; "
        "say --horizon extend (stretch the decay to the new end), rewarm (warm up again from here and decay to the new end) or "
        "keep (the old decay, then its lowest rate), or give the decay a length of its own with --lr_decay_iters"
    )
