"""Runs the jobs of a stage on a Ray cluster, through Ray Data; needs the extra `ray`.

Each job is a row of a Ray dataset and is mapped by one task, so Ray schedules the work and restarts it when a
machine is lost. Results are files, as with every executor: the output folder (and the input) must be on a
file system that all machines see.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llm_trainer.data.pipeline.jobs import Executor, Job, run_job
from llm_trainer.errors import DataError, LLMTrainerError, UsageError


@contextlib.contextmanager
def ray_executor(workers: int, address: str | None) -> Iterator[Executor]:
    """Open an executor on a Ray cluster.

    The cluster is the one that this process is connected to, else the one at `address`, else one that is
    started on this machine and ends with the context.

    Args:
        workers: Number of jobs that run at once.
        address: Address of a running cluster.

    Raises:
        DataError: The cluster cannot be reached.
        UsageError: The extra is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise UsageError("the executor 'ray' needs the extra 'ray': pip install 'llm-trainer[ray]'") from None
    # It logs every stage at length; progress is shown by the pipeline.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    starts_ray = not ray.is_initialized()
    if starts_ray:
        try:
            num_cpus = None if address is not None else workers
            ray.init(
                address or "local",
                num_cpus=num_cpus,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise DataError(
                f"no Ray cluster at {address or 'this machine'} ({error});"
                " start one, or use the executor 'local'"
            ) from None
    try:
        yield _RayExecutor(workers)
    finally:
        if starts_ray:
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
