"""Caches the results of stages by key, one folder `<output>/.stages/<stage>/<key>/` each.

The key of a result is a hash of everything that decides it: the keys of its inputs, the options that it
depends on, and the version of the code. It contains no path and no date, so moving the texts or the folder
keeps the result, and any change misses the cache. A result is written into a temporary folder and renamed
when it is complete: an interrupted run leaves complete results and temporary folders; the next run removes
the temporary folders and reuses the results.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pydantic import JsonValue
from rich.console import Console

from llm_trainer.data.pipeline.jobs import Executor
from llm_trainer.data.progress import ByteProgress
from llm_trainer.errors import DataError

STAGES_FOLDER = ".stages"
STATS_FILE = "facts.json"
_TEMPORARY_PREFIX = ".making-"

Advance = Callable[[int], None]

# Part of every key. Increase a stage's number when the same input would give another result.
VERSIONS = {"read": 1, "deduplicate": 1, "sample": 1, "tokenizer": 1, "encode": 1, "texts": 1, "assemble": 1}


class Task(Protocol):
    """Work on one partition: picklable, and writing the same files each time that it runs."""

    @property
    def name(self) -> str:
        """The partition's name, for messages."""

    @property
    def size(self) -> int:
        """Bytes of work, for progress."""

    def run(self, folder: Path, advance: Advance) -> None:
        """Write the result's files into `folder`; `advance` may be called with the bytes done so far."""


def stage_key(stage: str, *inputs: JsonValue) -> str:
    """The key of a stage's result: a hash of its inputs (keys and options) and of the stage's version."""
    content = json.dumps([stage, VERSIONS[stage], *inputs], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()[:40]


def write_stats(folder: Path, stats: Mapping[str, JsonValue]) -> None:
    """Write the numbers that later stages read from a result."""
    (folder / STATS_FILE).write_text(json.dumps(stats, ensure_ascii=False, sort_keys=True), encoding="utf-8")


def read_stats(folder: Path) -> dict[str, JsonValue]:
    """Read what `write_stats` wrote.

    Raises:
        DataError: The file is damaged, as it may be after a power failure.
    """
    try:
        found = json.loads((folder / STATS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged_result(folder, error) from None
    assert isinstance(found, dict)
    return found


def damaged_result(folder: Path, error: Exception) -> DataError:
    """The error for a cached result that cannot be read."""
    return DataError(
        f"the cached result {folder} is damaged ({error}); remove that folder and run the command again"
    )


@dataclass(frozen=True)
class _TaskJob:
    """Runs a task in a temporary folder and renames it."""

    task: Task
    folder: Path

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def size(self) -> int:
        return self.task.size

    def __call__(self, advance: Advance) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX, dir=self.folder.parent))
        try:
            self.task.run(temporary, advance)
            temporary.rename(self.folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@dataclass
class StageCache:
    """The results in one output folder, and the executor that computes missing ones.

    Attributes:
        folder: The folder of all results.
        executor: Runs tasks.
        console: Shows progress.
        num_computed: Stage → number of results that this run computed.
        num_cached: Stage → number of results that this run found.
        seconds: Stage → time that it took.
    """

    folder: Path
    executor: Executor
    console: Console | None = None
    num_computed: Counter[str] = field(default_factory=Counter)
    num_cached: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    _used: set[Path] = field(default_factory=set)

    @classmethod
    def open(cls, output: Path, executor: Executor, console: Console | None) -> StageCache:
        """Open the cache of an output folder, and remove the temporary folders of interrupted runs."""
        folder = output / STAGES_FOLDER
        for temporary in folder.glob(f"*/{_TEMPORARY_PREFIX}*"):
            shutil.rmtree(temporary, ignore_errors=True)
        return cls(folder, executor, console)

    def run_tasks(self, stage: str, tasks: Mapping[str, Task], description: str) -> dict[str, Path]:
        """Compute the results that are not cached.

        Args:
            stage: Name of the stage.
            tasks: Key → task.
            description: Text of the progress bar.

        Returns:
            Key → folder of the result.
        """
        folders = {key: self.folder / stage / key for key in tasks}
        missing = [_TaskJob(tasks[key], folder) for key, folder in folders.items() if not folder.is_dir()]
        with (
            self.timed(stage),
            ByteProgress(self.console, description, sum(job.size for job in missing)) as progress,
        ):
            self.executor.run(missing, progress.advance)
        self._count(stage, computed=len(missing), folders=folders.values())
        return folders

    def run_here(self, stage: str, key: str, compute: Callable[[Path], None]) -> Path:
        """Compute one result in this process, if it is not cached.

        Args:
            stage: Name of the stage.
            key: Key of the result.
            compute: Writes the result into the folder that it is given.

        Returns:
            The folder of the result.
        """
        folder = self.folder / stage / key
        is_missing = not folder.is_dir()
        with self.timed(stage):
            if is_missing:
                _TaskJob(_FunctionTask(stage, compute), folder)(lambda count: None)
        self._count(stage, computed=int(is_missing), folders=[folder])
        return folder

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time of the `with` block to that of a stage."""
        began = time.monotonic()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - began

    def _count(self, stage: str, computed: int, folders: Collection[Path]) -> None:
        self.num_computed[stage] += computed
        self.num_cached[stage] += len(folders) - computed
        self._used.update(folders)

    def remove_unused(self) -> None:
        """Remove the results that this run did not use: those of older input and other options."""
        for result in self.folder.glob("*/*"):
            if result not in self._used:
                shutil.rmtree(result, ignore_errors=True)

    def remove(self) -> None:
        """Remove all results."""
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class _FunctionTask:
    name: str
    compute: Callable[[Path], None]
    size: int = 0

    def run(self, folder: Path, advance: Advance) -> None:
        self.compute(folder)
