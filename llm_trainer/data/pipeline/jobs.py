"""What executors run: the protocols of jobs and executors, and how one job is run.

A job writes its result to a file and returns nothing, so neither texts nor ids travel between processes, and
the result does not depend on the executor.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from llm_trainer.errors import LLMTrainerError


class Job(Protocol):
    """One picklable unit of work."""

    @property
    def name(self) -> str:
        """The name that messages use."""

    @property
    def size(self) -> int:
        """Bytes of work."""

    def __call__(self, advance: Callable[[int], None]) -> None:
        """Do the work; `advance` may be called with the number of bytes done since the last call."""


class Executor(Protocol):
    """Runs jobs, in any order."""

    def run(self, jobs: Sequence[Job], advance: Callable[[int], None]) -> None:
        """Run all jobs.

        The first error stops the others; one of the project's own errors gets the name of its job.

        Args:
            jobs: The jobs.
            advance: Called with the number of bytes done since the last call.
        """


def run_job(job: Job, advance: Callable[[int], None]) -> None:
    """Run one job, and add its name to the project's own errors."""
    try:
        job(advance)
    except LLMTrainerError as error:
        if job.name in str(error):
            raise
        raise type(error)(f"{job.name}: {error}") from None


def follow_parent_process() -> None:
    """Leave Ctrl-C to the parent process, and end when the parent ends for whatever reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
