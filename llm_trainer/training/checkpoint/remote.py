"""A copy of the run folder in object storage, or wherever fsspec can write. Uploads happen in the background.

Object storage has no rename, so the manifest decides whether a checkpoint exists there. All other files are
uploaded first and the manifest last; what is replaced or deleted loses its manifest first. Readers ignore a
folder without one. What a run does not continue is set aside by renaming the manifest alone, since moving the
rest would mean copying it.

Everything is written to the local run folder first, with the guarantees of store.py. A failed upload is
reported after the step and repeated with the next checkpoint. A run whose copy is incomplete at its end ends
with an error.
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
from llm_trainer.training.checkpoint.async_writer import AsyncWriter

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

SET_ASIDE = "manifest-set-aside.json"
_RUN_RECORDS = (RUN_FILE, METRICS_FILE)
_EXTRAS = {"s3": "s3", "s3a": "s3"}

Log = Callable[[str], None]


def is_address(name: str | None) -> bool:
    """Whether this is an address (`s3://bucket/run`) and not the name of a folder."""
    return name is not None and "://" in name


def with_local_folders(training: TrainingConfig) -> TrainingConfig:
    """Settings in which `output_dir` is a local folder. An address there becomes `remote_dir`, and a folder
    in the user's cache takes its place.

    Args:
        training: The settings. They are not changed.

    Raises:
        UsageError: If `output_dir` and `remote_dir` are two different addresses.
    """
    if is_address(training.output_dir):
        if training.remote_dir not in (None, training.output_dir):
            raise UsageError(
                f"output_dir {training.output_dir} and remote_dir {training.remote_dir} are two different "
                "addresses; keep one of them"
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
            raise CheckpointError(f"there is no complete checkpoint at {spec}; check the address")
        return training.model_copy(update={"resume_from": str(found)})
    if training.remote_dir is not None and (
        spec == "auto" or (spec is None and training.init_from == "resume")
    ):
        RemoteRun(training.remote_dir, Path(training.output_dir)).fetch_newer(log)
    return training


class RemoteRun:
    """The remote copy of a run folder.

    Args:
        address: Where the copy is: `s3://bucket/run`.
        run_folder: The local run folder.
        save_total_limit: How many of the newest lasting checkpoints are kept there (None: all).
        ephemeral_limit: How many ephemeral checkpoints are kept there.

    Raises:
        UsageError: If the address cannot be reached.
    """

    def __init__(
        self, address: str, run_folder: Path, save_total_limit: int | None = None, ephemeral_limit: int = 1
    ) -> None:
        self.address, self.run_folder = address.rstrip("/"), run_folder
        self.save_total_limit, self.ephemeral_limit = save_total_limit, ephemeral_limit
        self._files, self._root = _open(self.address)
        self._writer = AsyncWriter()
        self._message = ""
        self._pending: list[str] = []  # names that are not uploaded yet, in the order of their saves

    # Upload.

    def begin(self, resumed_step: int | None) -> None:
        """Set aside what this run does not continue: everything for a new run, else what is past its step.

        Args:
            resumed_step: The step that the run resumes from; None for a new run.

        Raises:
            CheckpointError: If the storage refuses.
        """
        stale = [name for name, step in self._names() if resumed_step is None or step > resumed_step]
        for name in stale:
            with self._translate_errors():
                self._files.mv(f"{self._root}/{name}/{MANIFEST_FILE}", f"{self._root}/{name}/{SET_ASIDE}")
        if stale:
            self._message = (
                f"{self.address}: set aside {', '.join(stale)} of another run, by renaming their manifests "
                f"to {SET_ASIDE}"
            )

    def queue_upload(self, name: str) -> None:
        """Upload a checkpoint in the background, after those that are queued already.

        Args:
            name: The name of its folder in the run folder.
        """
        self._pending = [*(pending for pending in self._pending if pending != name), name]
        self._writer.submit(self._upload_pending)

    def take_messages(self) -> list[str]:
        """Lines for the user since the last call: what was set aside, and what failed."""
        lines, self._message = [self._message] if self._message else [], ""
        if self._writer.has_failed:
            try:
                self._writer.collect()
            except CheckpointError as error:
                lines.append(f"{error}; the upload is tried again with the next checkpoint")
        return lines

    def finish(self) -> None:
        """Wait until the copy is complete.

        Raises:
            CheckpointError: If it cannot be completed; the message names the reason.
        """
        with contextlib.suppress(CheckpointError):  # what is pending is tried again, and reported then
            self._writer.collect()
        self._writer.submit(self._upload_pending)
        self._writer.collect()

    def _upload_pending(self) -> Path:
        while self._pending:
            name = self._pending.pop(0)
            try:
                if (self.run_folder / name).is_dir():  # else it was rotated away meanwhile
                    with self._translate_errors():
                        self._upload(name)
            except CheckpointError:
                self._pending.insert(0, name)
                raise
        with self._translate_errors():
            self._rotate()
            for file in _RUN_RECORDS:
                if (self.run_folder / file).exists():
                    self._files.put_file(str(self.run_folder / file), f"{self._root}/{file}")
        return self.run_folder

    def _upload(self, name: str) -> None:
        local, remote = self.run_folder / name, f"{self._root}/{name}"
        self._delete(name)
        try:
            for path in sorted(
                path for path in local.rglob("*") if path.is_file() and path.name != MANIFEST_FILE
            ):
                target = f"{remote}/{path.relative_to(local).as_posix()}"
                self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
                self._files.put_file(str(path), target)
            self._files.put_file(str(local / MANIFEST_FILE), f"{remote}/{MANIFEST_FILE}")
        except FileNotFoundError:
            if local.is_dir():
                raise
            self._delete(name)  # it was rotated away during the upload

    def _delete(self, name: str) -> None:
        """Delete a remote checkpoint, its manifest first."""
        remote = f"{self._root}/{name}"
        if self._files.exists(f"{remote}/{MANIFEST_FILE}"):
            self._files.rm_file(f"{remote}/{MANIFEST_FILE}")
        if self._files.exists(remote):
            self._files.rm(remote, recursive=True)

    def _rotate(self) -> None:
        numbered = [name for name, _ in self._names() if name not in (BEST_MODEL, FINAL_MODEL)]
        ephemeral = [name for name in numbered if name.startswith(EPHEMERAL_PREFIX)]
        lasting = [name for name in numbered if name not in ephemeral]
        limit = len(lasting) if self.save_total_limit is None else max(1, self.save_total_limit)
        for name in [*ephemeral[max(1, self.ephemeral_limit) :], *lasting[limit:]]:
            self._delete(name)

    # Download.

    def fetch_newer(self, log: Log) -> Path | None:
        """Download the newest complete checkpoint if it is of a later step than the local ones.

        Args:
            log: Called with each line for the user.

        Returns:
            Its local folder; None if there is none.

        Raises:
            CheckpointError: If the storage refuses.
        """
        local = list_checkpoints(self.run_folder)
        local_step = next((one.step for one in local if not verify(one.path, contents=False)), -1)
        for name, step in self._names():
            if step > local_step and (found := self._fetch_complete(name, log)) is not None:
                return found
        return None

    def fetch(self, name: str | None, log: Log) -> Path | None:
        """Download one checkpoint.

        Args:
            name: Its name; None for the newest complete one.
            log: Called with each line for the user.

        Returns:
            Its local folder; None if there is none.

        Raises:
            CheckpointError: If the storage refuses.
        """
        for remote_name, _ in self._names():
            if name in (None, remote_name) and (found := self._fetch_complete(remote_name, log)) is not None:
                return found
        return None

    def _fetch_complete(self, name: str, log: Log) -> Path | None:
        """The local folder of a checkpoint, downloaded unless it exists; None if it is damaged."""
        target, temporary = self.run_folder / name, self.run_folder / f"{TEMPORARY_PREFIX}fetched-{name}"
        if target.is_dir() and not verify(target):
            return target
        log(f"fetching {self.address}/{name}")
        shutil.rmtree(temporary, ignore_errors=True)
        self.run_folder.mkdir(parents=True, exist_ok=True)
        try:
            with self._translate_errors():
                self._download(name, temporary)
            if problems := verify(temporary):
                log(f"skipping {self.address}/{name}: {'; '.join(problems[:3])}")
                return None
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return target

    def _download(self, name: str, folder: Path) -> None:
        remote = f"{self._root}/{name}"
        for path in self._files.find(remote):
            local = folder / str(path).removeprefix(f"{remote}/")
            local.parent.mkdir(parents=True, exist_ok=True)
            self._files.get_file(path, str(local))
        for file in _RUN_RECORDS:
            if not (self.run_folder / file).exists() and self._files.exists(f"{self._root}/{file}"):
                self._files.get_file(f"{self._root}/{file}", str(self.run_folder / file))

    def _names(self) -> list[tuple[str, int]]:
        """Remote checkpoints that have a manifest, with their steps, newest first."""
        with self._translate_errors():
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
    def _translate_errors(self) -> Iterator[None]:
        """Turn what the storage or the network refuses into a CheckpointError. The clients' errors have no
        common class.
        """
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{self.address} could not be read or written: {type(error).__name__}: {error}"
            ) from error


def _open(address: str) -> tuple[AbstractFileSystem, str]:
    import fsspec

    scheme = address.partition("://")[0]
    try:
        files, root = fsspec.core.url_to_fs(address)
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        reason = f"it needs the extra '{extra}': pip install 'llm-trainer[{extra}]'" if extra else str(error)
        raise UsageError(f"{address} cannot be reached: {reason}") from error
    except ValueError as error:
        raise UsageError(f"{address} is not an address that fsspec supports: {error}") from error
    return _without_cache(files), str(root).rstrip("/")


def _without_cache(files: Any) -> AbstractFileSystem:
    """The file system without its cache of listings, because other processes write there too."""
    files.use_listings_cache = False
    files.invalidate_cache()
    file_system: AbstractFileSystem = files
    return file_system


def _run_and_name(address: str) -> tuple[str, str | None]:
    """The run's address, and the checkpoint's name if the last part of the address is one."""
    run, _, name = address.rstrip("/").rpartition("/")
    return (
        (run, name)
        if step_from_name(name) is not None or name in (BEST_MODEL, FINAL_MODEL)
        else (address.rstrip("/"), None)
    )
