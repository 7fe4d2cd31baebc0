"""Verifies that resuming is bit-exact.

A part of a run is trained again twice: once without interruption, and once with a save and a resume in the
middle. All tensors and the run state must be equal. If the run has a later checkpoint of its own within that
part, the replay is compared with it too, which shows that not only resuming but this run is reproducible.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llm_trainer.config import CheckpointError, UsageError
from llm_trainer.run_dir import (
    FINAL_MODEL,
    JSON,
    OPTIMIZER_FOLDER,
    REPLACED_PREFIX,
    FoundCheckpoint,
    list_checkpoints,
    verify,
)
from llm_trainer.training.callbacks.callback import Callback
from llm_trainer.training.checkpoint.checkpoint_policy import best_model_of
from llm_trainer.training.checkpoint.optimizer_state import read_tensors
from llm_trainer.training.checkpoint.store import read_state
from llm_trainer.training.run import TrainingRun

if TYPE_CHECKING:
    from llm_trainer.training.trainer import Trainer

# (checkpoint to resume from, or None for the start of the run; run folder to write to; callbacks) → a trainer
# with the run's own settings.
BuildTrainer = Callable[[Path | None, Path, Sequence[Callback]], "Trainer"]

# Entries of the state that differ between two equal runs.
_TIME_DEPENDENT = {"seconds"}
_COPY_ATTEMPTS = 5


@dataclass(frozen=True)
class Comparison:
    """The comparison of two checkpoints of the same step.

    Attributes:
        title: What is compared.
        differences: A line for each tensor and entry of the state that is not bit-exactly equal.
    """

    title: str
    differences: list[str]


@dataclass(frozen=True)
class VerificationReport:
    """The result of a replay from step `first_step` to `last_step`."""

    first_step: int
    last_step: int
    comparisons: list[Comparison] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether everything that was compared is bit-exactly equal."""
        return not any(comparison.differences for comparison in self.comparisons)

    def __str__(self) -> str:
        lines = [f"steps {self.first_step} to {self.last_step}: {'exact' if self.exact else 'NOT exact'}"]
        for comparison in self.comparisons:
            count = len(comparison.differences)
            lines.append(f"  {comparison.title}: {f'{count} differences' if count else 'bit-exactly equal'}")
            lines += [f"    {difference}" for difference in comparison.differences]
        return "\n".join(lines)


class StopAtStep(Callback):
    """Stops a run after a step, like a user's interrupt at that step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, run: TrainingRun, step: int) -> None:
        """Request the stop once the step is reached."""
        if step >= self.step:
            run.stop()


def verify_resume(run: Path, steps: int, build: BuildTrainer) -> VerificationReport:
    """Replay steps of a run from one of its checkpoints, or from its start, and compare the results.

    All is written to a temporary folder outside the run folder (`TMPDIR` says where), which is removed
    afterwards. The run may train meanwhile: what is compared is copied first.

    Args:
        run: The run folder.
        steps: The number of steps to replay, at least 2.
        build: Builds a trainer with the settings of the run.

    Raises:
        UsageError: `steps` is below 2.
        CheckpointError: The run has no complete checkpoint, or the replay ended early.
    """
    if steps < 2:
        raise UsageError(
            f"invalid number of steps: {steps} cannot be interrupted in the middle; replay 2 or more"
        )
    with tempfile.TemporaryDirectory(prefix="verify-resume-", ignore_cleanup_errors=True) as folder:
        scratch = Path(folder)
        start, own = _copy_selected(run, steps, scratch / "original")
        return _replay(start, own, steps, scratch, build)


def _replay(
    start: FoundCheckpoint | None,
    own: FoundCheckpoint | None,
    steps: int,
    scratch: Path,
    build: BuildTrainer,
) -> VerificationReport:
    """Train the steps with and without an interruption, and compare."""
    first = start.step if start is not None else 0
    last = own.step if own is not None else first + steps
    middle = (first + last) // 2
    uninterrupted = _train(build, start.path if start else None, scratch / "uninterrupted", last)
    halfway = _train(build, start.path if start else None, scratch / "halfway", middle)
    resumed = _train(build, halfway, scratch / "resumed", last)
    comparisons = [
        Comparison(
            f"uninterrupted against resumed at step {middle}",
            compare_checkpoints(uninterrupted, resumed),
        )
    ]
    if own is not None:
        # If the best model of the run is a later one, the replay starts without one, and its lowest loss
        # is that of the replayed steps.
        ignore = (
            {"best_validation_loss"} if start is not None and best_model_of(start.path) is None else set()
        )
        differences = compare_checkpoints(own.path, uninterrupted, ignore=ignore)
        comparisons.append(Comparison(f"replayed against {own.path.name} of the run", differences))
    return VerificationReport(first, last, comparisons)


def compare_checkpoints(first: Path, second: Path, *, ignore: Collection[str] = ()) -> list[str]:
    """Compare two checkpoint folders bit by bit.

    Args:
        first: A checkpoint folder.
        second: Another one.
        ignore: Entries of the state that are not compared.

    Returns:
        A line for each tensor and each entry of the state that differs.
    """
    mine, theirs = dict(_tensors(first)), dict(_tensors(second))
    differences = [f"{name} is in only one of the two" for name in sorted(mine.keys() ^ theirs.keys())]
    for name in sorted(mine.keys() & theirs.keys()):
        if difference := _difference(mine[name], theirs[name]):
            differences.append(f"{name} {difference}")
    one, other = read_state(first), read_state(second)
    for key in sorted((one.keys() | other.keys()) - _TIME_DEPENDENT - {*ignore}):
        a, b = (json.dumps(state.get(key), sort_keys=True) for state in (one, other))
        if a != b:
            differences.append(f"state {key}: {a} and {b}")
    return differences


def _select_steps(run: Path, steps: int) -> tuple[FoundCheckpoint | None, FoundCheckpoint | None]:
    """The checkpoint to start from, and a later one of the run to compare with, at most `steps` apart.

    The newest such pair is used. Checkpoints of the best model are saved during validation, before the
    callbacks between two steps have run: a replay can start from them but not be compared with them. Without
    such a pair the replay starts from the newest checkpoint with enough steps before the end of the run, or
    from the start of the run.
    """
    states = dict(_complete_checkpoints(run))
    if not states:
        raise CheckpointError(
            f"{run} has no complete checkpoint to replay from; give the folder of a run that has saved one"
        )
    starts: list[FoundCheckpoint | None] = [*states, None]
    for own in [one for one, state in states.items() if not state.get("between_steps_pending")]:
        for start in starts:
            if 2 <= own.step - (start.step if start else 0) <= steps:
                return start, own
    newest = next(iter(states))
    # A run that early stopping or a callback ended has no steps after its final model.
    end = max(one.step for one in states) if _is_final(newest) else None
    fits = (
        one
        for one, state in states.items()
        if one.step + steps <= (_total_steps(one, state) if end is None else end)
    )
    return next(fits, None), None


def _is_final(newest: FoundCheckpoint) -> bool:
    """Whether the run has ended at its newest checkpoint."""
    final = newest.path.with_name(FINAL_MODEL)
    return newest.path.name == FINAL_MODEL or (
        final.is_dir() and not verify(final) and read_state(final).get("step") == newest.step
    )


def _complete_checkpoints(run: Path) -> Iterator[tuple[FoundCheckpoint, Mapping[str, JSON]]]:
    """The complete checkpoints of a run with their states, by decreasing step."""
    for one in list_checkpoints(run):
        if not verify(one.path):
            with contextlib.suppress(CheckpointError):  # a run that trains meanwhile has removed it
                yield one, read_state(one.path)


def _copy_selected(
    run: Path, steps: int, folder: Path
) -> tuple[FoundCheckpoint | None, FoundCheckpoint | None]:
    """What `_select_steps` finds, copied with the best model that counts for it: a run that trains meanwhile
    may remove its own. Where it has just done so, the search is repeated.
    """
    for attempt in range(_COPY_ATTEMPTS):
        start, own = _select_steps(run, steps)
        best = None if start is None else best_model_of(start.path, contents=False)
        copies: dict[Path, Path] = {}
        try:
            for path in {one.path for one in (start, own) if one is not None} | ({best} if best else set()):
                copies[path] = folder / f"{attempt}" / path.name.removeprefix(REPLACED_PREFIX)
                shutil.copytree(path, copies[path], copy_function=_link_or_copy)
            if not any(verify(copy) for copy in copies.values()):
                return _at(start, copies), _at(own, copies)
        except OSError as error:  # shutil.Error is one
            if not any(verify(path, contents=False) for path in copies):
                raise CheckpointError(
                    f"the checkpoints of {run} could not be copied to {folder}: {error}; set TMPDIR to a "
                    "folder with enough space"
                ) from error
    raise CheckpointError(
        f"the checkpoints of {run} were replaced {_COPY_ATTEMPTS} times while they were copied: the run "
        "saves faster than they can be read; try again when it has ended"
    )


def _at(one: FoundCheckpoint | None, copies: Mapping[Path, Path]) -> FoundCheckpoint | None:
    return None if one is None else FoundCheckpoint(copies[one.path], one.step)


def _link_or_copy(source: str, target: str) -> str:
    """A second name for a file, which no save ever changes in place; a copy on another file system."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copy2(source, target)
    return target


def _total_steps(one: FoundCheckpoint, state: Mapping[str, JSON]) -> int:
    total = state.get("total_steps")
    return total if isinstance(total, int) else one.step


def _train(build: BuildTrainer, start: Path | None, folder: Path, last: int) -> Path:
    trainer = build(start, folder, [StopAtStep(last)])
    result = trainer.train()
    if result.step != last:
        raise CheckpointError(
            f"the replay ended at step {result.step} instead of {last} ({result.ended_by}); "
            "replay fewer steps"
        )
    return folder / FINAL_MODEL


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    yield from read_tensors(folder)
    yield from read_tensors(folder / OPTIMIZER_FOLDER)


def _difference(one: Tensor, other: Tensor) -> str | None:
    if one.shape != other.shape or one.dtype != other.dtype:
        first, second = (f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (one, other))
        return f"is {first} in the first, {second} in the second"
    as_bytes = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)]
    if torch.equal(*as_bytes):
        return None
    distance = (one.double() - other.double()).abs()
    count, largest = int((distance > 0).sum()), float(distance.max())
    return f"differs in {count} of {one.numel()} values, by at most {largest:.3g}"
