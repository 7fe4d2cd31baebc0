"""A run folder's copy in object storage, or wherever fsspec has a way to: checkpoints go there in the
background and come back on a resume.

Object storage knows no rename, so a checkpoint there is what its manifest says: all other files are uploaded
first and the manifest last, and what is replaced or deleted loses its manifest first. A folder without one is
nothing to any reader. What a run does not go on from is set aside by renaming its manifest alone, since to
move the rest would be to copy it.

Everything is written to the local run folder first, with all that checkpoints.py promises. An upload that
fails is told at the next edge of a step and tried again with the next checkpoint; a run whose copy is not
whole at its end ends with an error.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_trainer.config import CheckpointError, TrainingConfig, UsageError
from llm_trainer.config.environment import local_copy_dir
from llm_trainer.run_dir import (
    BEST_MODEL,
    EPHEMERAL_PREFIX,
    FINAL_MODEL,
    MANIFEST_FILE,
    METRICS_FILE,
    RUN_FILE,
    TEMPORARY_PREFIX,
    list_checkpoints,
    step_from_name,
    verify,
)
from llm_trainer.training.checkpoint.async_writer import Background

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

SET_ASIDE = "manifest-set-aside.json"
_OF_THE_RUN = (RUN_FILE, METRICS_FILE)
_EXTRAS = {"s3": "s3", "s3a": "s3"}

Log = Callable[[str], None]


def is_address(name: str | None) -> bool:
    """Whether this is an address (`s3://bucket/run`) and not a folder's name."""
    return name is not None and "://" in name


def with_local_folders(training: TrainingConfig) -> TrainingConfig:
    """Settings in which `output_dir` is a local folder. An address there becomes `remote_dir`, and a folder in
    the user's cache takes its place.

    Args:
        training: The settings. They are not changed.

    Raises:
        UsageError: If `output_dir` and `remote_dir` are two different addresses.
    """
    if is_address(training.output_dir):
        if training.remote_dir not in (None, training.output_dir):
            raise UsageError(
                f"output_dir {training.output_dir} and remote_dir {training.remote_dir} are two addresses; keep one"
            )
        local = str(local_copy_dir(training.output_dir))
        return training.model_copy(update={"remote_dir": training.output_dir, "output_dir": local})
    return training


def fetch_checkpoint(training: TrainingConfig, log: Log) -> TrainingConfig:
    """Download the checkpoint that the settings resume from, where it is at a remote address.

    Args:
        training: The settings, with local folders. They are not changed.
        log: Called with each line for the user.

    Returns:
        The settings in which `resume_from` is a local folder, or `auto`.

    Raises:
        CheckpointError: If there is no complete checkpoint at the address.
        UsageError: If the address cannot be reached.
    """
    spec = training.resume_from
    if spec is not None and is_address(spec):
        run, name = _run_and_name(spec)
        found = RemoteRun(run, local_copy_dir(run)).fetch(name, log)
        if found is None:
            raise CheckpointError(f"{spec} holds no complete checkpoint")
        return training.model_copy(update={"resume_from": str(found)})
    if training.remote_dir is not None and (
        spec == "auto" or (spec is None and training.init_from == "resume")
    ):
        RemoteRun(training.remote_dir, Path(training.output_dir)).fetch_newer(log)
    return training


class RemoteRun:
    """The copy at `address` of the local `run_folder`. Limits as in the store: how many lasting and recent
    checkpoints are kept there.
    """

    def __init__(
        self, address: str, run_folder: Path, save_total_limit: int | None = None, ephemeral_limit: int = 1
    ) -> None:
        self.address, self.run_folder = address.rstrip("/"), run_folder
        self.save_total_limit, self.ephemeral_limit = save_total_limit, ephemeral_limit
        self._files, self._root = _opened(self.address)
        self._background = Background()
        self._set_aside = ""
        self._left: list[str] = []  # names that are not there yet, in the order of their saves

    # On the way there.

    def begin(self, resumed_step: int | None) -> None:
        """Set aside what a run does not go on from: everything for a new one (None), else what is past its
        step.
        """
        stale = [name for name, step in self._names() if resumed_step is None or step > resumed_step]
        for name in stale:
            with self._reached():
                self._files.mv(f"{self._root}/{name}/{MANIFEST_FILE}", f"{self._root}/{name}/{SET_ASIDE}")
        if stale:
            self._set_aside = f"{self.address}: this run does not go on from {', '.join(stale)}; their manifests are named {SET_ASIDE} now"

    def upload_later(self, name: str) -> None:
        """Upload a checkpoint that has just been saved, behind those that are on their way."""
        self._left = [*(left for left in self._left if left != name), name]
        self._background.do(self._upload_left)

    def news(self) -> list[str]:
        """Lines for the person: what was set aside, and what went wrong since the last time."""
        lines, self._set_aside = [self._set_aside] if self._set_aside else [], ""
        if self._background.has_failed:
            try:
                self._background.collect()
            except CheckpointError as error:
                lines.append(f"{error}; it is tried again with the next checkpoint")
        return lines

    def finish(self) -> None:
        """Until all is there. Raises CheckpointError, naming the checkpoints that are not."""
        with contextlib.suppress(CheckpointError):  # what is left is tried once more, and told then
            self._background.collect()
        self._background.do(self._upload_left)
        self._background.collect()

    def _upload_left(self) -> Path:
        while self._left:
            name = self._left.pop(0)
            try:
                if (self.run_folder / name).is_dir():  # else rotated away meanwhile
                    with self._reached():
                        self._upload(name)
            except CheckpointError:
                self._left.insert(0, name)
                raise
        with self._reached():
            self._rotate()
            for file in _OF_THE_RUN:
                if (self.run_folder / file).exists():
                    self._files.put_file(str(self.run_folder / file), f"{self._root}/{file}")
        return self.run_folder

    def _upload(self, name: str) -> None:
        local, there = self.run_folder / name, f"{self._root}/{name}"
        self._forget(name)
        try:
            for path in sorted(
                path for path in local.rglob("*") if path.is_file() and path.name != MANIFEST_FILE
            ):
                place = f"{there}/{path.relative_to(local).as_posix()}"
                self._files.makedirs(place.rpartition("/")[0], exist_ok=True)
                self._files.put_file(str(path), place)
            self._files.put_file(str(local / MANIFEST_FILE), f"{there}/{MANIFEST_FILE}")
        except FileNotFoundError:
            if local.is_dir():
                raise
            self._forget(name)  # rotated away under our hands

    def _forget(self, name: str) -> None:
        """Delete a checkpoint there, its manifest first."""
        there = f"{self._root}/{name}"
        if self._files.exists(f"{there}/{MANIFEST_FILE}"):
            self._files.rm_file(f"{there}/{MANIFEST_FILE}")
        if self._files.exists(there):
            self._files.rm(there, recursive=True)

    def _rotate(self) -> None:
        numbered = [name for name, _ in self._names() if name not in (BEST_MODEL, FINAL_MODEL)]
        recent = [name for name in numbered if name.startswith(EPHEMERAL_PREFIX)]
        lasting = [name for name in numbered if name not in recent]
        limit = len(lasting) if self.save_total_limit is None else max(1, self.save_total_limit)
        for name in [*recent[max(1, self.ephemeral_limit) :], *lasting[limit:]]:
            self._forget(name)

    # On the way back.

    def fetch_newer(self, log: Log) -> Path | None:
        """Bring the newest whole checkpoint here where it is further than what is here; None where nothing
        is.
        """
        here = next(
            (one.step for one in list_checkpoints(self.run_folder) if not verify(one.path, contents=False)),
            -1,
        )
        return next(
            (
                found
                for name, step in self._names()
                if step > here and (found := self._fetched(name, log)) is not None
            ),
            None,
        )

    def fetch(self, name: str | None, log: Log) -> Path | None:
        """Bring one checkpoint here (None: the newest that is whole); None where there is none."""
        names = [there for there, _ in self._names() if name in (None, there)]
        return next((found for there in names if (found := self._fetched(there, log)) is not None), None)

    def _fetched(self, name: str, log: Log) -> Path | None:
        """The local folder of a checkpoint, downloaded unless it is here, or None where it is not whole."""
        place, temporary = self.run_folder / name, self.run_folder / f"{TEMPORARY_PREFIX}fetched-{name}"
        if place.is_dir() and not verify(place):
            return place
        log(f"fetching {self.address}/{name}")
        shutil.rmtree(temporary, ignore_errors=True)
        self.run_folder.mkdir(parents=True, exist_ok=True)
        try:
            with self._reached():
                self._download(name, temporary)
            if problems := verify(temporary):
                log(f"skipping {self.address}/{name}: {'; '.join(problems[:3])}")
                return None
            shutil.rmtree(place, ignore_errors=True)
            temporary.rename(place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return place

    def _download(self, name: str, folder: Path) -> None:
        there = f"{self._root}/{name}"
        for path in self._files.find(there):
            local = folder / str(path).removeprefix(f"{there}/")
            local.parent.mkdir(parents=True, exist_ok=True)
            self._files.get_file(path, str(local))
        for file in _OF_THE_RUN:
            if not (self.run_folder / file).exists() and self._files.exists(f"{self._root}/{file}"):
                self._files.get_file(f"{self._root}/{file}", str(self.run_folder / file))

    def _names(self) -> list[tuple[str, int]]:
        """Checkpoints there with their steps, newest first; those without a manifest are none."""
        with self._reached():
            if not self._files.exists(self._root):
                return []
            found = []
            for path in self._files.ls(self._root, detail=False):
                name = str(path).rstrip("/").rpartition("/")[2]
                if (
                    self._files.exists(f"{self._root}/{name}/{MANIFEST_FILE}")
                    and (step := self._step_of(name)) is not None
                ):
                    found.append((name, step))
        return sorted(found, key=lambda one: (-one[1], one[0] in (BEST_MODEL, FINAL_MODEL)))

    def _step_of(self, name: str) -> int | None:
        import json

        if name not in (BEST_MODEL, FINAL_MODEL):
            return step_from_name(name)
        step = json.loads(self._files.cat_file(f"{self._root}/{name}/state.json")).get("step")
        return step if isinstance(step, int) else None

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        """What the storage and the ways to it refuse, in words; their clients' errors are no kind of their
        own.
        """
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{self.address} could not be read or written: {type(error).__name__}: {error}"
            ) from error


def _opened(address: str) -> tuple[AbstractFileSystem, str]:
    import fsspec

    scheme = address.partition("://")[0]
    try:
        files, root = fsspec.core.url_to_fs(address)
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        way = f"it needs the extra '{extra}': pip install 'llm-trainer[{extra}]'" if extra else str(error)
        raise UsageError(f"{address} cannot be reached: {way}") from error
    except ValueError as error:
        raise UsageError(f"{address} is no address that fsspec knows: {error}") from error
    return _plain(files), str(root).rstrip("/")


def _plain(files: Any) -> AbstractFileSystem:
    """The file system, without its memory of listings: other processes write there too."""
    files.use_listings_cache = False
    files.invalidate_cache()
    plain: AbstractFileSystem = files
    return plain


def _run_and_name(address: str) -> tuple[str, str | None]:
    """The run's address and the checkpoint's name, where the last part of the address is one."""
    run, _, name = address.rstrip("/").rpartition("/")
    return (
        (run, name)
        if step_from_name(name) is not None or name in (BEST_MODEL, FINAL_MODEL)
        else (address.rstrip("/"), None)
    )
