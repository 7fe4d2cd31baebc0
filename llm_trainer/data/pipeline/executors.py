"""Executors for the jobs of a stage: this process, several processes, or a Ray cluster (`ray_executor.py`).

Worker processes are started with `spawn`: forking a process that has threads, as the tokenizer libraries do,
can deadlock.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Literal

from llm_trainer.data.pipeline.jobs import Executor, Job, follow_parent_process, run_job
from llm_trainer.data.pipeline.ray_executor import ray_executor
from llm_trainer.errors import DataError

_MIN_BYTES_FOR_PROCESSES = 16 * 2**20  # bytes of work; starting a process takes about a second


@contextlib.contextmanager
def open_executor(
    kind: Literal["local", "ray"], workers: int, ray_address: str | None = None
) -> Iterator[Executor]:
    """Open an executor; its processes end with the context.

    Args:
        kind: This machine, or a Ray cluster.
        workers: Number of jobs that run at once.
        ray_address: Address of a running cluster; by default one is started on this machine.

    Raises:
        DataError: The cluster cannot be reached.
        UsageError: Ray is not installed.
    """
    if kind == "ray":
        with ray_executor(workers, ray_address) as executor:
            yield executor
    elif workers == 1:
        yield SerialExecutor()
    else:
        with contextlib.closing(ProcessExecutor(workers)) as processes:
            yield processes


class SerialExecutor:
    """Runs one job after another in this process."""

    def run(self, jobs: Sequence[Job], advance: Callable[[int], None]) -> None:
        """Run all jobs; `advance` is called with exactly the size of each job in total."""
        for job in jobs:
            left = job.size

            def advance_at_most(count: int) -> None:
                nonlocal left
                advance(min(count, left))
                left -= min(count, left)

            run_job(job, advance_at_most)
            advance(left)


class ProcessExecutor:
    """Runs jobs in several processes, which are started once there is enough work for them.

    The processes end with this one, even if it is killed.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        self._other_children = {*multiprocessing.active_children()}

    def run(self, jobs: Sequence[Job], advance: Callable[[int], None]) -> None:
        """Run all jobs; a single job or a small amount of work runs in this process.

        Raises:
            DataError: A worker process died; the message names the jobs that were running.
        """
        if len(jobs) < 2 or sum(job.size for job in jobs) < _MIN_BYTES_FOR_PROCESSES:
            SerialExecutor().run(jobs, advance)
            return
        self._pool = self._pool or ProcessPoolExecutor(
            self._workers, mp_context=multiprocessing.get_context("spawn"), initializer=follow_parent_process
        )
        running: dict[Future[None], Job] = {}
        left = iter(jobs)
        try:
            while True:
                for job in left:
                    running[self._pool.submit(run_job, job, _ignore)] = job
                    if len(running) > self._workers:  # one more than the workers, so that none is idle
                        break
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    future.result()
                    advance(running.pop(future).size)
        except KeyboardInterrupt:
            # `close` waits for the current jobs, which may take long, and the workers ignore Ctrl-C.
            for worker in set(multiprocessing.active_children()) - self._other_children:
                worker.kill()
            raise
        except BrokenProcessPool:
            names = ", ".join(job.name for job in running.values())
            raise DataError(
                f"a worker process died while it worked on one of: {names}. It ran out of memory or was"
                " killed: run the same command again to resume, with fewer num_workers if memory is short."
                " In a script of your own, call prepare_dataset under `if __name__ == '__main__':`"
            ) from None
        finally:
            for future in running:
                future.cancel()

    def close(self) -> None:
        """End the processes after their current jobs."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _ignore(count: int) -> None:
    pass
