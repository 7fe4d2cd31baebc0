"""The proof of resuming: train a stretch of a run straight through, again with a save and a resume in the
middle, and compare every bit.

Where the run kept a later checkpoint of its own within that stretch, the replay is compared with it too: then
what is shown is not only that resuming is exact, but that this run was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llm_trainer.config import CheckpointError, UsageError
from llm_trainer.run_dir import (
    FINAL_MODEL,
    OPTIMIZER_FOLDER,
    TEMPORARY_PREFIX,
    FoundCheckpoint,
    list_checkpoints,
    verify,
)
from llm_trainer.training.callbacks import Callback
from llm_trainer.training.checkpoint.optimizer_state import read_tensors
from llm_trainer.training.checkpoint.store import read_state
from llm_trainer.training.standing import best_beside

if TYPE_CHECKING:
    from llm_trainer.training.trainer import Trainer

# (checkpoint to resume or None for the run's beginning, run folder to write to, callbacks) → a trainer with
# the run's own settings.
BuildTrainer = Callable[[Path | None, Path, Sequence[Callback]], "Trainer"]

# What differs between two equal runs.
_OF_THE_CLOCK = {"seconds"}


@dataclass(frozen=True)
class Comparison:
    """Two ways to one step, and each thing that is not the same to the bit."""

    what: str
    differences: list[str]


@dataclass(frozen=True)
class VerifyReport:
    """What a replay from step `first_step` to `last_step` showed."""

    first_step: int
    last_step: int
    comparisons: list[Comparison] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether everything compared was equal to the bit."""
        return not any(comparison.differences for comparison in self.comparisons)

    def __str__(self) -> str:
        lines = [f"steps {self.first_step} to {self.last_step}: {'exact' if self.exact else 'NOT exact'}"]
        for comparison in self.comparisons:
            lines.append(
                f"  {comparison.what}: {f'{len(comparison.differences)} differences' if comparison.differences else 'equal to the bit'}"
            )
            lines += [f"    {difference}" for difference in comparison.differences]
        return "\n".join(lines)


class StopAt(Callback):
    """Ends a run after a step, as if it had been told to stop there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Trainer, step: int) -> None:
        """Ask to stop once the step is reached."""
        if step >= self.step:
            trainer.stop_training = True


def verify_resume(run: Path, steps: int, build: BuildTrainer) -> VerifyReport:
    """Replay `steps` steps of `run` from one of its checkpoints (or its beginning, where none is early
    enough) and say what is not exact.

    Everything is written to a folder of its own in `run`, which is removed after. Raises UsageError for fewer
    than 2 steps, CheckpointError where the run holds no checkpoint.
    """
    if steps < 2:
        raise UsageError(f"{steps} steps cannot be interrupted in the middle; replay 2 or more")
    start, own = _stretch(run, steps)
    first = start.step if start is not None else 0
    last = own.step if own is not None else first + steps
    middle = (first + last) // 2
    scratch = run / f"{TEMPORARY_PREFIX}verify-resume"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        straight = _train(build, start.path if start else None, scratch / "straight", last)
        halfway = _train(build, start.path if start else None, scratch / "halfway", middle)
        resumed = _train(build, halfway, scratch / "resumed", last)
        comparisons = [
            Comparison(
                f"straight through against resumed at step {middle}", compare_checkpoints(straight, resumed)
            )
        ]
        if own is not None:
            # Where the run's best model is a later one, the replay had none to begin with, and its lowest
            # loss is of the replayed steps.
            beside = (
                {"best_validation_loss"} if start is not None and best_beside(start.path) is None else set()
            )
            differences = compare_checkpoints(own.path, straight, beside=beside)
            comparisons.append(Comparison(f"replayed against {own.path.name} of the run", differences))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return VerifyReport(first, last, comparisons)


def compare_checkpoints(first: Path, second: Path, *, beside: Collection[str] = ()) -> list[str]:
    """Each tensor and each entry of the state (but `beside`) that is not the same to the bit in two
    checkpoint folders, a line each.
    """
    mine, theirs = dict(_tensors(first)), dict(_tensors(second))
    differences = [f"{name} is in one only" for name in sorted(mine.keys() ^ theirs.keys())]
    for name in sorted(mine.keys() & theirs.keys()):
        if difference := _difference(mine[name], theirs[name]):
            differences.append(f"{name} {difference}")
    one, other = read_state(first), read_state(second)
    for key in sorted((one.keys() | other.keys()) - _OF_THE_CLOCK - {*beside}):
        a, b = (json.dumps(state.get(key), sort_keys=True) for state in (one, other))
        if a != b:
            differences.append(f"state {key}: {a} and {b}")
    return differences


def _stretch(run: Path, steps: int) -> tuple[FoundCheckpoint | None, FoundCheckpoint | None]:
    """Where the replay starts, and the run's own later checkpoint to compare with: the newest such pair at
    most `steps` apart.

    The best model is from a validation's middle, before what comes between two steps: a replay can start
    there, but not be compared with it. Without such a pair the start is the newest checkpoint with as many
    steps before the run's end, or the run's beginning.
    """
    whole = [one for one in list_checkpoints(run) if not verify(one.path)]
    if not whole:
        raise CheckpointError(f"{run} holds no whole checkpoint to replay from")
    starts: list[FoundCheckpoint | None] = [*whole, None]
    for own in [one for one in whole if not read_state(one.path).get("before_operations")]:
        for start in starts:
            if 2 <= own.step - (start.step if start else 0) <= steps:
                return start, own
    return next((one for one in whole if one.step + steps <= _total_steps(one)), None), None


def _total_steps(one: FoundCheckpoint) -> int:
    total = read_state(one.path).get("total_steps")
    return total if isinstance(total, int) else one.step


def _train(build: BuildTrainer, start: Path | None, folder: Path, last: int) -> Path:
    trainer = build(start, folder, [StopAt(last)])
    result = trainer.train()
    if result.step != last:
        raise CheckpointError(
            f"the replay ended at step {result.step} instead of {last} ({result.ended_by}); replay fewer steps"
        )
    return folder / FINAL_MODEL


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    yield from read_tensors(folder)
    yield from read_tensors(folder / OPTIMIZER_FOLDER)


def _difference(one: Tensor, other: Tensor) -> str | None:
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"is {one.dtype} {tuple(one.shape)} in one, {other.dtype} {tuple(other.shape)} in the other"
    as_bytes = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)]
    if torch.equal(*as_bytes):
        return None
    distance = (one.double() - other.double()).abs()
    return f"differs in {int((distance > 0).sum())} of {one.numel()} numbers, by {float(distance.max()):.3g} at most"
