"""Work that goes on while the run trains, one piece after another, and whose failure is told to whoever asks
next.

A daemon thread, and not an executor: on several ranks the work may wait for a rank that has died, and nothing
must keep the process from leaving then.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path

from llm_trainer.config import CheckpointError, LLMTrainerError

Task = Callable[[], Path]


class Background:
    """A thread and its tasks. Its methods are called from one other thread."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self._given, self._ended = 0, 0
        self._change = threading.Condition()
        self._done: list[Path] = []
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a task has not ended."""
        with self._change:
            return self._ended < self._given

    @property
    def has_results(self) -> bool:
        """Whether there is something to collect."""
        with self._change:
            return bool(self._done)

    @property
    def has_failed(self) -> bool:
        """Whether a failure waits to be told."""
        with self._change:
            return self._failure is not None

    def do(self, task: Task) -> None:
        """Begin a task, or put it behind those that are going on. After a failure the tasks behind it are
        left out.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="save-checkpoints", daemon=True)
            self._thread.start()
        with self._change:
            self._given += 1
        self._tasks.put(task)

    def wait(self) -> None:
        """Until nothing is going on."""
        with self._change:
            self._change.wait_for(lambda: self._ended == self._given)

    def collect(self) -> list[Path]:
        """What was written since the last time; waits. Raises the failure of a task, once, as a
        CheckpointError.
        """
        self.wait()
        with self._change:
            done, failure = self._done, self._failure
            self._done, self._failure = [], None
        if isinstance(failure, LLMTrainerError):
            raise failure
        if failure is not None:
            raise CheckpointError(
                f"a checkpoint could not be saved in the background: {failure!r}"
            ) from failure
        return done

    def _run(self) -> None:
        while True:
            task = self._tasks.get()
            result: Path | None = None
            failure: BaseException | None = None
            if self._failure is None:
                try:
                    result = task()
                except BaseException as error:  # whatever it is, a thread would lose it
                    failure = error
            with self._change:
                self._ended += 1
                self._done += [result] if result is not None else []
                self._failure = self._failure or failure
                self._change.notify_all()
