"""Runs the jobs of a stage on a Ray cluster, through Ray Data; needs the extra `ray`.

Each job is a row of a Ray dataset and is mapped by one task, so Ray schedules the work and restarts it when a
machine is lost. Results are files, as with every executor: the output folder (and the input) must be on a
file system that all machines see.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import multiprocessing
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from llm_trainer.data.pipeline.jobs import Executor, Job, follow_parent_process, run_job
from llm_trainer.errors import DataError, LLMTrainerError, UsageError


@contextlib.contextmanager
def ray_executor(workers: int, address: str | None) -> Iterator[Executor]:
    """Open an executor on a Ray cluster.

    The cluster is the one that this process is connected to, else the one at `address`, else one that is
    started on this machine and ends with the context. A process of its own connects to the last two: Ray's
    client leaves threads behind when it disconnects, and they can end the process a minute later, because the
    cluster no longer answers.

    Args:
        workers: Number of jobs that run at once.
        address: Address of a running cluster.

    Raises:
        DataError: The cluster cannot be reached.
        UsageError: The extra is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise UsageError("the executor 'ray' needs the extra 'ray': pip install 'llm-trainer[ray]'")
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield _RayExecutor(workers)
        return
    context = multiprocessing.get_context("spawn")
    connection, other_end = context.Pipe()
    process = context.Process(target=_drive, args=(other_end, workers, address))
    process.start()
    other_end.close()
    try:
        executor = _RemoteRayExecutor(connection)
        executor.wait_until_connected()
        yield executor
        with contextlib.suppress(ConnectionError):
            connection.send(None)
    except BaseException:
        process.terminate()
        raise
    finally:
        process.join()
        connection.close()


class _RemoteRayExecutor:
    """Sends jobs to the process that `_drive` runs in."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def wait_until_connected(self) -> None:
        """Wait until the other process is connected to the cluster.

        Raises:
            DataError: The cluster cannot be reached.
        """
        self._read_answers(lambda count: None)

    def run(self, jobs: Sequence[Job], advance: Callable[[int], None]) -> None:
        """Run all jobs; an error of the project's own is raised with the name of its job."""
        if jobs:
            with contextlib.suppress(ConnectionError):  # reading finds out, too, that the process has died
                self._connection.send(list(jobs))
            self._read_answers(advance)

    def _read_answers(self, advance: Callable[[int], None]) -> None:
        try:
            while (answer := self._connection.recv()) is not None:
                if isinstance(answer, str):
                    raise DataError(answer)
                advance(answer)
        except (EOFError, ConnectionError):
            raise DataError(
                "the process that runs the Ray jobs died. It ran out of memory or was killed: run the same"
                " command again to resume. In a script of your own, call prepare_dataset under"
                " `if __name__ == '__main__':`"
            ) from None


def _drive(connection: Connection, workers: int, address: str | None) -> None:
    """Run jobs from a connection on Ray until None arrives.

    Answers bytes of work that are done, then None at the end of each list of jobs; or the text of an error.
    """
    follow_parent_process()
    import ray

    try:
        ray.init(
            address or "local",
            num_cpus=None if address is not None else workers,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        connection.send(
            f"no Ray cluster at {address or 'this machine'} ({error}); start one, or use the executor 'local'"
        )
        return
    connection.send(None)
    executor = _RayExecutor(workers)
    try:
        while (jobs := connection.recv()) is not None:
            try:
                executor.run(jobs, connection.send)
                connection.send(None)
            except DataError as error:
                connection.send(str(error))
            except ray.exceptions.RayError as error:
                connection.send(f"Ray could not run the jobs: {error}")
    finally:
        ray.shutdown()


class _RayExecutor:
    """Maps jobs by Ray Data, `workers` at once."""

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def run(self, jobs: Sequence[Job], advance: Callable[[int], None]) -> None:
        """Run all jobs; an error of the project's own is raised with the name of its job."""
        if not jobs:
            return
        import ray.data

        # Ray Data logs every stage at length; the pipeline shows progress.
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        current_folder = str(Path.cwd())
        rows = ray.data.from_items(
            [{"job": pickle.dumps(job), "folder": current_folder} for job in jobs],
            override_num_blocks=len(jobs),
        )
        for row in rows.map(
            _run_row, num_cpus=1, compute=ray.data.TaskPoolStrategy(size=self._workers)
        ).iter_rows():
            if row["error"]:
                raise DataError(row["error"])
            advance(row["size"])


def _run_row(row: dict[str, Any]) -> dict[str, Any]:
    """Run the job of a row; an error becomes text, since Ray would wrap an exception in its own traceback."""
    job: Job = pickle.loads(row["job"])
    try:
        with contextlib.chdir(row["folder"]):  # paths may be relative to the folder of the command
            run_job(job, lambda count: None)
    except LLMTrainerError as error:
        return {"size": job.size, "error": str(error)}
    return {"size": job.size, "error": ""}
