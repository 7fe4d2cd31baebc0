"""The jobs of a stage on a Ray cluster, through Ray Data; an extra.

Each job is a row of a Ray data set and is mapped by one task, so Ray places the work, and starts it again
where a machine is lost. Results are files, as everywhere: the output folder (and the input) must be on a file
system that all machines see.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llm_trainer.data.pipeline.executors import Executor, Job, perform
from llm_trainer.errors import DataError, LLMTrainerError, UsageError


@contextlib.contextmanager
def ray_executor(workers: int, address: str | None) -> Iterator[Executor]:
    """Ray as it runs here already, else the cluster at `address`, else one on this machine, which ends with
    the context.

    Raises UsageError where the extra is not installed, and DataError where the cluster cannot be reached.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise UsageError("the executor 'ray' needs the extra 'ray': pip install 'llm-trainer[ray]'") from None
    logging.getLogger("ray.data").setLevel(
        logging.ERROR
    )  # it tells of every stage at length; progress is ours to show
    is_ours = not ray.is_initialized()
    if is_ours:
        try:
            own = None if address is not None else workers
            ray.init(
                address or "local",
                num_cpus=own,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise DataError(
                f"no Ray cluster at {address or 'this machine'} ({error}); start one, or use the executor 'local'"
            ) from None
    try:
        yield _OnRay(workers)
    finally:
        if is_ours:
            ray.shutdown()


class _OnRay:
    """Maps jobs by Ray Data, so many at once."""

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def run(self, jobs: Sequence[Job], advance: Callable[[int], None]) -> None:
        """Do all jobs. Raises what a job raised, where it is an error of ours, with the job's name."""
        if not jobs:
            return
        import ray.data

        ray.data.DataContext.get_current().enable_progress_bars = False
        here = str(Path.cwd())
        rows = ray.data.from_items(
            [{"job": pickle.dumps(job), "folder": here} for job in jobs], override_num_blocks=len(jobs)
        )
        for row in rows.map(
            _perform, num_cpus=1, compute=ray.data.TaskPoolStrategy(size=self._workers)
        ).iter_rows():
            if row["error"]:
                raise DataError(row["error"])
            advance(row["size"])


def _perform(row: dict[str, Any]) -> dict[str, Any]:
    """One row: the job done, or what is wrong with it in words (Ray would wrap an exception in pages of its
    own).
    """
    job: Job = pickle.loads(row["job"])
    try:
        with contextlib.chdir(row["folder"]):  # paths may be relative to where the command was given
            perform(job, lambda count: None)
    except LLMTrainerError as error:
        return {"size": job.size, "error": str(error)}
    return {"size": job.size, "error": ""}
