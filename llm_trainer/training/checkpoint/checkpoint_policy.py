"""When a run saves, and who is told: the part of the loop that stands between the trainer and its store."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.config import TrainingConfig
from llm_trainer.run_dir import BEST_MODEL, FINAL_MODEL
from llm_trainer.training.checkpoint.store import CheckpointStore, Progress

if TYPE_CHECKING:
    from llm_trainer.config.duration import Duration
    from llm_trainer.training.trainer import Trainer


def store_for(training: TrainingConfig, *, is_main: bool = True) -> CheckpointStore:
    """The store that the settings ask for; the main rank's has the copy at `remote_dir`."""
    folder, limits = Path(training.output_dir), (training.save_total_limit, training.recent_save_limit)
    remote = None
    if training.remote_dir is not None and is_main:
        from llm_trainer.training.checkpoint.remote import RemoteRun

        remote = RemoteRun(training.remote_dir, folder, *limits)
    return CheckpointStore(
        folder, limits[0], recent_limit=limits[1], asynchronous=training.asynchronous_saves, remote=remote
    )


class Saving:
    """The saves of one run. All ranks call its methods, at the edges of the same steps."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._store = trainer, trainer.store
        self._last = time.monotonic()

    def save_if_due(self, *, wanted: bool) -> None:
        """Save what this step calls for; `wanted`: a lasting checkpoint whatever the intervals say."""
        training = self._trainer.training
        if wanted or self._is_step_of(training.save_interval) or self._is_minute():
            self.save()
        elif self._is_step_of(training.recent_save_interval):
            self.save(recent=True)

    def save(self, *, emergency: bool = False, recent: bool = False) -> None:
        """Save now; one that is neither is a lasting checkpoint. An emergency's is there on return, the
        others perhaps later.
        """
        trainer, start = self._trainer, time.perf_counter()
        save = (
            self._store.save_emergency
            if emergency
            else self._store.save_recent
            if recent
            else self._store.save
        )
        with trainer.engine.timings.of("saving"):
            save(trainer.snapshot(), trainer.state.step)
        self._last = time.monotonic()
        trainer.meter.leave_out(time.perf_counter() - start)

    def progress(self) -> Progress:
        """What to agree on with the other ranks (the largest counts) before `tell`."""
        return self._store.progress

    def tell(self) -> None:
        """Wait for what is going on, and tell the callbacks of each checkpoint. Raises CheckpointError for a
        save that failed.
        """
        for path in self._store.wait():
            if path.name not in (BEST_MODEL, FINAL_MODEL):
                for callback in self._trainer.callbacks:
                    callback.on_checkpoint(self._trainer, path)
        for line in self._store.remote.news() if self._store.remote is not None else []:
            self._trainer.say(line)

    def finish(self) -> None:
        """At the run's end: tell of what was saved, and wait until its copy elsewhere is whole. Raises
        CheckpointError where it is not.
        """
        self.tell()
        self._trainer.ranks.main_does(self._store.finish_uploads)

    def leave(self) -> None:
        """The run ends, perhaps by an error: let a save that is going on end too, and say what failed."""
        if problem := self._store.leave(self._trainer.ranks):
            self._trainer.say(problem)

    def _is_step_of(self, interval: Duration | None) -> bool:
        return (
            interval is not None and self._trainer.state.step % self._trainer.length.in_steps(interval) == 0
        )

    def _is_minute(self) -> bool:
        minutes = self._trainer.training.save_minutes
        return minutes is not None and bool(
            self._trainer.ranks.largest([time.monotonic() - self._last >= 60 * minutes])[0]
        )
