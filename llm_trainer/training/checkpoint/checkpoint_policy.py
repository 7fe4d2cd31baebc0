"""When a run saves which kind of checkpoint, where to, and which best model counts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

from llm_trainer.config import TrainingConfig
from llm_trainer.config.duration import Duration
from llm_trainer.distributed.process_group import ProcessGroup
from llm_trainer.run_dir import BEST_MODEL, verify
from llm_trainer.training.checkpoint.remote import RemoteRun
from llm_trainer.training.checkpoint.store import CheckpointStore, read_state
from llm_trainer.training.optim.lr_schedule import RunLength


def build_store(training: TrainingConfig, *, is_main: bool = True) -> CheckpointStore:
    """The checkpoint store that the settings ask for.

    Args:
        training: The settings `output_dir`, `remote_dir`, the limits and `asynchronous_saves`.
        is_main: Whether this is the main rank, whose store makes the copy at `remote_dir`.
    """
    folder = Path(training.output_dir)
    lasting, ephemeral = training.save_total_limit, training.ephemeral_save_limit
    remote = None
    if training.remote_dir is not None and is_main:
        remote = RemoteRun(training.remote_dir, folder, lasting, ephemeral)
    return CheckpointStore(
        folder, lasting, ephemeral_limit=ephemeral, asynchronous=training.asynchronous_saves, remote=remote
    )


class CheckpointPolicy:
    """Decides which checkpoint a step calls for, by the intervals in steps and in minutes.

    Args:
        training: The settings `save_interval`, `save_minutes` and `ephemeral_save_interval`.
    """

    def __init__(self, training: TrainingConfig) -> None:
        self._training = training
        self._last_save = time.monotonic()

    def note_save(self) -> None:
        """A checkpoint was saved: `save_minutes` counts from here."""
        self._last_save = time.monotonic()

    def due(
        self, step: int, length: RunLength, process_group: ProcessGroup
    ) -> Literal["lasting", "ephemeral"] | None:
        """The kind of checkpoint that is due after a step. A collective call.

        Args:
            step: The step.
            length: The run's length, which turns intervals into steps.
            process_group: The ranks, which agree on the minutes.
        """

        def is_step_of(interval: Duration | None) -> bool:
            return interval is not None and step % length.in_steps(interval) == 0

        if is_step_of(self._training.save_interval) or self._is_time(process_group):
            return "lasting"
        return "ephemeral" if is_step_of(self._training.ephemeral_save_interval) else None

    def _is_time(self, process_group: ProcessGroup) -> bool:
        minutes = self._training.save_minutes
        if minutes is None:
            return False
        is_over = time.monotonic() - self._last_save >= 60 * minutes
        return bool(process_group.all_reduce_max([is_over])[0])


def best_model_of(checkpoint: Path, *, contents: bool = True) -> Path | None:
    """The complete best model in a checkpoint's run folder, if it is the best of the steps up to the
    checkpoint.

    Args:
        checkpoint: A checkpoint folder.
        contents: Whether to verify the contents of the best model's files; else only their sizes.
    """
    best = checkpoint.parent / BEST_MODEL
    if not best.is_dir() or verify(best, contents=contents):
        return None
    known, found = read_state(checkpoint), read_state(best)
    step, steps = found.get("step"), known.get("step")
    is_before = isinstance(step, int) and isinstance(steps, int) and step <= steps
    has_same_loss = found.get("best_validation_loss") == known.get("best_validation_loss")
    return best if is_before and has_same_loss else None
