"""A thread that writes or uploads checkpoints one after another while the run trains.

It is a daemon thread, not an executor: with several ranks a task may wait for a rank that has died, and the
process has to be able to exit then. The next `collect` raises the error of a task that failed.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path

from llm_trainer.config import CheckpointError, LLMTrainerError

Task = Callable[[], Path]


class AsyncWriter:
    """Runs tasks in one thread, in the order of submission. Only one other thread may call its methods."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self._submitted, self._finished = 0, 0
        self._change = threading.Condition()
        self._results: list[Path] = []
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a task is waiting or running."""
        with self._change:
            return self._finished < self._submitted

    @property
    def has_results(self) -> bool:
        """Whether there are results to collect."""
        with self._change:
            return bool(self._results)

    @property
    def has_failed(self) -> bool:
        """Whether a task has failed since the last `collect`."""
        with self._change:
            return self._failure is not None

    def submit(self, task: Task) -> None:
        """Run a task after those that were submitted before.

        Args:
            task: Writes something and returns its path. It is skipped if an earlier task has failed and the
                failure was not collected yet.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="save-checkpoints", daemon=True)
            self._thread.start()
        with self._change:
            self._submitted += 1
        self._tasks.put(task)

    def wait(self) -> None:
        """Wait until all tasks have ended."""
        with self._change:
            self._change.wait_for(lambda: self._finished == self._submitted)

    def collect(self) -> list[Path]:
        """Wait until all tasks have ended.

        Returns:
            What they have returned since the last call.

        Raises:
            CheckpointError: If a task has failed since the last call.
        """
        self.wait()
        with self._change:
            results, failure = self._results, self._failure
            self._results, self._failure = [], None
        if isinstance(failure, LLMTrainerError):
            raise failure
        if failure is not None:
            raise CheckpointError(
                f"a checkpoint could not be saved in the background: {failure!r}"
            ) from failure
        return results

    def _run(self) -> None:
        while True:
            task = self._tasks.get()
            result: Path | None = None
            failure: BaseException | None = None
            if self._failure is None:
                try:
                    result = task()
                except BaseException as error:  # a thread would lose it, whatever it is
                    failure = error
            with self._change:
                self._finished += 1
                self._results += [result] if result is not None else []
                self._failure = self._failure or failure
                self._change.notify_all()
