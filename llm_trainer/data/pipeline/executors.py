"""Who does the jobs of a stage: this process, several processes, or a Ray cluster (`ray_executor.py`).

A job writes its result to a file and gives nothing back, so neither texts nor ids travel between processes,
and which executor ran it leaves no trace in the result. Processes are started afresh (`spawn`): forking a
process that has threads, as the tokenizer libraries do, may hang.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Literal, Protocol

from llm_trainer.errors import DataError, LLMTrainerError

_WORTH_PROCESSES = 16 * 2**20  # bytes of work; starting a process takes about a second


class Job(Protocol):
    """One piece of work, picklable."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def size(self) -> int:
        """Bytes of work."""

    def __call__(self, advance: Callable[[int], None]) -> None:
        """Do it; `advance` may be told how many bytes are done."""


class Executor(Protocol):
    """Runs jobs, in any order. The first error ends the rest; where it is ours, its message gets the job's
    name.
    """

    def run(self, jobs: Sequence[Job], advance: Callable[[int], None]) -> None:
        """Do all jobs, telling `advance` of the bytes that are done."""


@contextlib.contextmanager
def open_executor(
    kind: Literal["local", "ray"], workers: int, ray_address: str | None = None
) -> Iterator[Executor]:
    """The executor of this kind; its processes end with the context. Raises UsageError where Ray is asked for
    and not installed.
    """
    if kind == "ray":
        from llm_trainer.data.pipeline.ray_executor import ray_executor

        with ray_executor(workers, ray_address) as executor:
            yield executor
    elif workers == 1:
        yield InProcess()
    else:
        with contextlib.closing(Processes(workers)) as processes:
            yield processes


def perform(job: Job, advance: Callable[[int], None]) -> None:
    """Do one job; an error of ours says whose it is."""
    try:
        job(advance)
    except LLMTrainerError as error:
        if job.name in str(error):
            raise
        raise type(error)(f"{job.name}: {error}") from None


class InProcess:
    """One job after another, here."""

    def run(self, jobs: Sequence[Job], advance: Callable[[int], None]) -> None:
        """Do all jobs; of each, `advance` hears no more than its size in all."""
        for job in jobs:
            left = job.size

            def advance_at_most(count: int) -> None:
                nonlocal left
                advance(min(count, left))
                left -= min(count, left)

            perform(job, advance_at_most)
            advance(left)


class Processes:
    """So many processes, started when there is enough work for them. They end with this one, even if it is
    killed.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def run(self, jobs: Sequence[Job], advance: Callable[[int], None]) -> None:
        """Do all jobs, little or single ones here. Raises DataError where a process died, naming the jobs
        that it may have died of.
        """
        if len(jobs) < 2 or sum(job.size for job in jobs) < _WORTH_PROCESSES:
            InProcess().run(jobs, advance)
            return
        self._pool = self._pool or ProcessPoolExecutor(
            self._workers, mp_context=multiprocessing.get_context("spawn"), initializer=_settle_worker
        )
        running: dict[Future[None], Job] = {}
        left = iter(jobs)
        try:
            while True:
                for job in left:
                    running[self._pool.submit(perform, job, _ignore)] = job
                    if len(running) > self._workers:  # one waits, so that nobody does
                        break
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    future.result()
                    advance(running.pop(future).size)
        except BrokenProcessPool:
            names = ", ".join(job.name for job in running.values())
            raise DataError(
                f"a worker process died while it worked on one of: {names}. Out of memory, or killed: run again to go on from there, with "
                "fewer num_workers if memory is short. In a script of your own, call prepare under `if __name__ == '__main__':`"
            ) from None
        finally:
            for future in running:
                future.cancel()

    def close(self) -> None:
        """End the processes, after the jobs at hand."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _ignore(count: int) -> None:
    pass


def _settle_worker() -> None:
    """Ctrl-C is for the process that started this one; and this one ends when that one does, however it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
