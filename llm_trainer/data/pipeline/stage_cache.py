"""What stages leave behind, found again by key: a folder `<output>/.stages/<stage>/<key>/` each.

A result's key is a hash of all that decides it: its inputs' keys, the options it reads, the version of the
code. No path and no date is in it, so moving the texts or the folder keeps it, and any change misses. A
result is written beside its place and renamed when it is whole: a run that is killed leaves whole results and
scraps, the next one clears the scraps away and goes on from the results.
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

from llm_trainer.data.pipeline.executors import Executor
from llm_trainer.data.progress import ByteProgress
from llm_trainer.errors import DataError

STAGES_FOLDER = ".stages"
FACTS_FILE = "facts.json"
_SCRAP = ".making-"

Advance = Callable[[int], None]

# Part of every key: raise a stage's number when the same input would give another result.
VERSIONS = {"read": 1, "deduplicate": 1, "sample": 1, "tokenizer": 1, "encode": 1, "texts": 1, "assemble": 1}


class Task(Protocol):
    """Work on one unit: picklable, and writing the same files each time that it runs."""

    @property
    def name(self) -> str:
        """The unit's, for messages."""

    @property
    def size(self) -> int:
        """Bytes of work, for progress."""

    def run(self, folder: Path, advance: Advance) -> None:
        """Write the result's files into `folder`; tell `advance` how many bytes are done, now and then."""


def key_of(stage: str, *inputs: JsonValue) -> str:
    """The key of a stage's result: the hash of its inputs (which are keys and options) and of the stage's
    version.
    """
    said = json.dumps([stage, VERSIONS[stage], *inputs], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(said.encode()).hexdigest()[:40]


def write_facts(folder: Path, facts: Mapping[str, JsonValue]) -> None:
    """Write `facts.json`."""
    (folder / FACTS_FILE).write_text(json.dumps(facts, ensure_ascii=False, sort_keys=True), encoding="utf-8")


def read_facts(folder: Path) -> dict[str, JsonValue]:
    """Read `facts.json`; raises DataError where it is damaged, as after a power failure."""
    try:
        found = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(folder, error) from None
    assert isinstance(found, dict)
    return found


def damaged(folder: Path, error: Exception) -> DataError:
    """The error for a result that cannot be read."""
    return DataError(f"the stage's result {folder} is damaged ({error}); remove that folder and run again")


@dataclass(frozen=True)
class _Making:
    """A job for an executor: run the task beside its place, then rename."""

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
        scrap = Path(tempfile.mkdtemp(prefix=_SCRAP, dir=self.folder.parent))
        try:
            self.task.run(scrap, advance)
            scrap.rename(self.folder)
        except BaseException:
            shutil.rmtree(scrap, ignore_errors=True)
            raise


@dataclass
class Stages:
    """The results below one output folder, and who makes those that are missing.

    `made` counts the results that this run made, `found` those that it found, `seconds` the time that each stage took.
    """

    folder: Path
    executor: Executor
    console: Console | None = None
    made: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    _used: set[Path] = field(default_factory=set)

    @classmethod
    def under(cls, output: Path, executor: Executor, console: Console | None) -> Stages:
        """Those of an output folder; what killed runs left half made is removed."""
        folder = output / STAGES_FOLDER
        for scrap in folder.glob(f"*/{_SCRAP}*"):
            shutil.rmtree(scrap, ignore_errors=True)
        return cls(folder, executor, console)

    def results(self, stage: str, tasks: Mapping[str, Task], what: str) -> dict[str, Path]:
        """The folder of each task's result, by key; the missing ones are made first. `what` is the progress
        bar's word.
        """
        folders = {key: self.folder / stage / key for key in tasks}
        missing = [_Making(tasks[key], folder) for key, folder in folders.items() if not folder.is_dir()]
        with (
            self.timed(stage),
            ByteProgress(self.console, what, sum(job.size for job in missing)) as progress,
        ):
            self.executor.run(missing, progress.advance)
        self._count(stage, made=len(missing), folders=folders.values())
        return folders

    def result(self, stage: str, key: str, make: Callable[[Path], None]) -> Path:
        """The folder of one result that this process makes itself, such as the tokenizer."""
        folder = self.folder / stage / key
        is_missing = not folder.is_dir()
        with self.timed(stage):
            if is_missing:
                _Making(_Here(stage, make), folder)(lambda count: None)
        self._count(stage, made=int(is_missing), folders=[folder])
        return folder

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the time of what is done within for this stage."""
        began = time.monotonic()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - began

    def _count(self, stage: str, made: int, folders: Collection[Path]) -> None:
        self.made[stage] += made
        self.found[stage] += len(folders) - made
        self._used.update(folders)

    def forget_others(self) -> None:
        """Remove the results that this run did not use: those of older input and other options."""
        for result in self.folder.glob("*/*"):
            if result not in self._used:
                shutil.rmtree(result, ignore_errors=True)

    def remove(self) -> None:
        """Remove all results."""
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class _Here:
    name: str
    make: Callable[[Path], None]
    size: int = 0

    def run(self, folder: Path, advance: Advance) -> None:
        self.make(folder)
