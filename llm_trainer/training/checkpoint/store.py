"""Saving and restoring everything that is state, so that a kill at any moment leaves a checkpoint that can be
trusted.

A save writes into `.tmp-<name>` beside its place, syncs every file to the disk, writes the manifest of sizes
and hashes last, and takes its name in one rename. Before that there is nothing that could be mistaken for a
checkpoint; after it the checkpoint is whole. Where the name is taken (`best_model`, or a step saved again)
the earlier holder steps aside to `.old-<name>` first, which readers accept for the instant in which it is the
only one. Older checkpoints are removed only after the new one lies verified in its place.

Each rank writes what it holds (capture.py); the main one makes the folder, and seals it when all have said
what they wrote. All of this may go on in a thread while the run trains (background.py): from copies, on a
line of its own between the ranks, one save after another. What fails there is raised by the next `wait` or
save, on all ranks alike.

A checkpoint is a folder: weights and `config.json` as Hugging Face has them, the tokenizer, `optimizer/`,
`state.json`, `run.json`, `random.json`, `manifest.json`. Nothing is pickled. The alternative not taken, `torch.save`, needs unpickling,
which runs what a stranger put in the file.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import nn

from llm_trainer.config import CheckpointError, RunConfig
from llm_trainer.distributed.parallelize import load_model_weights
from llm_trainer.distributed.process_group import ProcessGroup
from llm_trainer.run_dir import (
    BEST_MODEL,
    EARLIER_PREFIX,
    EPHEMERAL_PREFIX,
    FINAL_MODEL,
    JSON,
    LOGS_FOLDER,
    METRICS_FILE,
    OPERATIONS_FILE,
    OPTIMIZER_FOLDER,
    RANDOM_FILE,
    REPLACED_PREFIX,
    RUN_FILE,
    STATE_FILE,
    TEMPORARY_PREFIX,
    WANDB_ID_FILE,
    FileEntry,
    checkpoint_name,
    emergency_name,
    ephemeral_name,
    file_entries,
    list_checkpoints,
    read_json,
    verify,
    write_manifest,
)
from llm_trainer.training.checkpoint.async_writer import Background
from llm_trainer.training.checkpoint.atomic_fs import (
    discard,
    remove,
    removed_on_failure,
    require_space,
    sync_file,
    take_place,
    told_as_checkpoint_error,
)
from llm_trainer.training.checkpoint.optimizer_state import load_optimizer_state
from llm_trainer.training.checkpoint.rng_state import restore_random_state
from llm_trainer.training.checkpoint.snapshot import (
    OPTIMIZER_SCALARS,
    Capture,
    HostCopies,
    SavedTokenizer,
    Snapshot,
    capture,
    described_anew,
    has_spare_core,
    host_memory_left,
    run_text,
    versions,
)
from llm_trainer.training.state import with_current_names

if TYPE_CHECKING:
    from llm_trainer.training.checkpoint.remote import RemoteRun

__all__ = [
    "CheckpointStore", "Progress", "SavedTokenizer", "Snapshot",
    "read_state", "restore", "restore_generators", "versions", "write_run_file",
]  # fmt: skip

# Beside the tensors: JSON files, the tokenizer, what the file system itself takes.
SPACE_BESIDE_TENSORS = 8 << 20
# Below, a save takes about as long as beginning one in the background: tens of milliseconds.
BACKGROUND_FROM_BYTES = 64 << 20
SYNC_THREADS = 8
Asynchronous = Literal["auto", "on", "off"]
_OF_ONE_RUN = (
    RUN_FILE,
    METRICS_FILE,
    OPERATIONS_FILE,
    LOGS_FOLDER,
    WANDB_ID_FILE,
    "report.html",
    "report.json",
)


class Progress(IntEnum):
    """Of what is written in the background. Of several ranks the largest counts."""

    NOTHING, WRITTEN, BUSY, FAILED = range(4)


class CheckpointStore:
    """The checkpoints of one run folder.

    `save_total_limit` is how many of the newest are kept (None: all), `ephemeral_limit` how many of those that are saved as recent ones;
    best_model and final_model are never removed. `asynchronous`: whether `save`, `save_recent` and `save_best` return once there are
    copies in the host's memory, and write in the background; auto: where that saves time (a
    large state, a processor that has time for it) and the copies fit.
    `remote`: where every checkpoint is uploaded once it is whole.
    """

    def __init__(
        self,
        run_folder: Path,
        save_total_limit: int | None = None,
        *,
        ephemeral_limit: int = 1,
        asynchronous: Asynchronous = "off",
        remote: RemoteRun | None = None,
    ) -> None:
        self.run_folder, self.remote = run_folder, remote
        self.save_total_limit, self.ephemeral_limit = save_total_limit, ephemeral_limit
        self.asynchronous = asynchronous
        self._background, self._copies = Background(), HostCopies()
        self._written: list[Path] = []
        self._line: ProcessGroup | None = None  # the ranks on the background's own line
        self._captured: Capture | None = None  # what is being written in the background

    def begin(self, resumed_step: int | None) -> Path | None:
        """Make room for a run: what an earlier one left here, and the coming one would take for its own,
        moves to `earlier-<n>/`.

        For a new run (None) that is every checkpoint, the metrics and the logs; for one that resumes, the
        checkpoints past its step. Nothing is deleted. Returns the folder that they were moved to, or None
        when there was nothing to move.
        """
        self.run_folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        if self.remote is not None:
            self.remote.begin(resumed_step)
        stale = [
            one.path
            for one in list_checkpoints(self.run_folder)
            if resumed_step is None or one.step > resumed_step
        ]
        if resumed_step is None:
            stale += [self.run_folder / name for name in _OF_ONE_RUN if (self.run_folder / name).exists()]
        if not stale:
            return None
        numbers = [
            int(path.name.removeprefix(EARLIER_PREFIX))
            for path in self.run_folder.glob(f"{EARLIER_PREFIX}[0-9]*")
        ]
        earlier = self.run_folder / f"{EARLIER_PREFIX}{max(numbers, default=0) + 1}"
        earlier.mkdir()
        for path in stale:
            path.rename(earlier / path.name.removeprefix(REPLACED_PREFIX))
        return earlier

    def save(self, snapshot: Snapshot, step: int) -> Path:
        """Write `checkpoint-<step>` and remove those past the limit. Raises CheckpointError, leaving the
        earlier ones as they were.
        """
        return self._save(checkpoint_name(step), snapshot, step)

    def save_ephemeral(self, snapshot: Snapshot, step: int) -> Path:
        """Write `recent-<step>`, which a later one of its kind replaces."""
        return self._save(ephemeral_name(step), snapshot, step)

    def save_best(self, snapshot: Snapshot) -> Path:
        """Write or replace `best_model`; when it is best, the caller decides."""
        return self._save(BEST_MODEL, snapshot, snapshot.step)

    def save_emergency(self, snapshot: Snapshot, step: int) -> Path:
        """Write `emergency-<step>`: a checkpoint between two regular ones, for a run that must leave now. It
        is there on return.

        What failed in the background before is raised after it is written.
        """
        self._background.wait()
        place = self._write_now(emergency_name(step), snapshot, step)
        self._settle()
        return place

    def save_final(self, snapshot: Snapshot) -> Path:
        """Write or replace `final_model`. It is there on return."""
        self._settle()
        return self._write_now(FINAL_MODEL, snapshot, snapshot.step)

    def newest(self) -> Path | None:
        """The newest checkpoint that verifies, or None."""
        return next((one.path for one in list_checkpoints(self.run_folder) if not verify(one.path)), None)

    @property
    def progress(self) -> Progress:
        """How it stands on this rank with what was to be written since the last `wait`."""
        if self._background.has_failed:
            return Progress.FAILED
        if self._background.is_busy:
            return Progress.BUSY
        return Progress.WRITTEN if self._written or self._background.has_results else Progress.NOTHING

    def wait(self) -> list[Path]:
        """Until nothing goes on in the background; what was written since the last time. Raises
        CheckpointError for what failed there.
        """
        self._settle()
        written, self._written = self._written, []
        return written

    def finish_uploads(self) -> None:
        """Until the copy at `remote` is whole. Raises CheckpointError where it cannot be made so."""
        if self.remote is not None:
            self.remote.finish()

    def _settle(self) -> None:
        self._captured = None
        self._written += self._background.collect()

    def leave(self, process_group: ProcessGroup) -> str | None:
        """At the end of a run that may have failed: let a save of one process end, and say what went wrong
        with it, if anything did.

        On several ranks it is not waited for, since another may be gone.
        """
        if process_group.world_size > 1 and self.progress == Progress.BUSY:
            return None
        try:
            self._settle()
        except CheckpointError as error:
            return str(error)
        return None

    def _save(self, name: str, snapshot: Snapshot, step: int) -> Path:
        """Now, or in the background behind what is being written from the same copies; other copies must have
        been written first.
        """
        if not self._is_worth_copies(snapshot):
            self._settle()
            return self._write_now(name, snapshot, step)
        if self._captured is not None and self._captured.is_of(snapshot):
            taken = described_anew(self._captured, snapshot, step)
        else:
            self._settle()
            taken = self._captured = capture(snapshot, step, self._copies)
        line = self._line = self._line or snapshot.process_group.new_group()
        self._background.do(lambda: self._write(name, taken, line))
        return self.run_folder / name

    def _write_now(self, name: str, snapshot: Snapshot, step: int) -> Path:
        place = self._write(name, capture(snapshot, step), snapshot.process_group)
        self._written.append(place)
        return place

    def _is_worth_copies(self, snapshot: Snapshot) -> bool:
        if self.asynchronous != "auto":
            return self.asynchronous == "on"
        size = snapshot.nbytes
        no_room = not has_spare_core(snapshot) or (
            not self._copies.are_made and size > host_memory_left() // 2
        )
        largest, lacking = snapshot.process_group.all_reduce_max([size, no_room])
        return largest >= BACKGROUND_FROM_BYTES and not lacking

    def _write(self, name: str, taken: Capture, process_group: ProcessGroup) -> Path:
        """Write a checkpoint, this rank its part of it; a collective call on the line of `ranks`."""
        place, temporary = self.run_folder / name, self.run_folder / f"{TEMPORARY_PREFIX}{name}"
        needed = int(process_group.all_reduce_sum([taken.nbytes])[0]) + SPACE_BESIDE_TENSORS
        with removed_on_failure(temporary) if process_group.is_main else contextlib.nullcontext():

            def begin() -> list[Path]:
                with told_as_checkpoint_error(place, needed):
                    return self._begin_folder(taken, place, temporary, needed)

            def write_part() -> str:
                with told_as_checkpoint_error(place, needed):
                    return json.dumps(_sealed(temporary, [*(described or []), *taken.write(temporary)]))

            def complete() -> None:
                with told_as_checkpoint_error(place, needed):
                    _complete(temporary, [json.loads(entries) for entries in parts])
                    take_place(temporary, place)

            described = process_group.run_on_main(begin)
            parts = process_group.run_on_all(write_part)
            process_group.run_on_main(complete)
        if process_group.is_main:
            with contextlib.suppress(
                OSError
            ):  # the save has succeeded; what cannot be removed now waits for the next one
                self._rotate(place)
            if self.remote is not None:
                self.remote.upload_later(name)
        return place

    def _begin_folder(self, taken: Capture, place: Path, temporary: Path, needed: int) -> list[Path]:
        """Make the folder, and in it all that is no tensor; which files these are."""
        self.run_folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        require_space(place, needed)
        temporary.mkdir()
        (temporary / OPTIMIZER_FOLDER).mkdir()
        for name, text in taken.texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        if taken.tokenizer is not None:
            taken.tokenizer.save(temporary)
        return [path for path in temporary.rglob("*") if path.is_file()]

    def _rotate(self, newest: Path) -> None:
        """Remove checkpoints past the limits, oldest first, once the newest is known to be whole.

        Its hashes were just computed from the files on the disk, so that sizes are what is left to compare.
        """
        if verify(newest, contents=False):
            return
        numbered = [
            one.path
            for one in list_checkpoints(self.run_folder)
            if one.path.name not in (BEST_MODEL, FINAL_MODEL)
        ]
        recent = [path for path in numbered if path.name.startswith(EPHEMERAL_PREFIX)]
        lasting = [path for path in numbered if path not in recent]
        limit = len(lasting) if self.save_total_limit is None else max(1, self.save_total_limit)
        for path in [*recent[max(1, self.ephemeral_limit) :], *lasting[limit:]]:
            discard(path)

    def _remove_leftovers(self) -> None:
        """Remove what crashed saves left, and give a name back to its earlier holder where the successor did
        not come.
        """
        for path in self.run_folder.glob(f"{REPLACED_PREFIX}*"):
            place = path.with_name(path.name.removeprefix(REPLACED_PREFIX))
            if place.exists():
                discard(path)
            else:
                path.rename(place)
        for path in self.run_folder.glob(f"{TEMPORARY_PREFIX}*"):
            remove(path)


def restore(
    path: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], *, verified: bool = False
) -> dict[str, JSON]:
    """Give `model` and `optimizers` the state of a checkpoint, to the bit, and return its `state`.

    The optimizers' settings stay as they are now. `verified`: the caller has just verified the folder. Raises
    CheckpointError for one that is damaged or does not fit.
    """
    if not verified and (problems := verify(path)):
        raise CheckpointError(f"{path} cannot be restored: {'; '.join(problems[:3])}")
    state = read_state(path)
    load_model_weights(model, path)
    scalars = state.pop(OPTIMIZER_SCALARS, {})
    load_optimizer_state(
        path / OPTIMIZER_FOLDER, scalars if isinstance(scalars, Mapping) else {}, model, optimizers
    )
    return state


def restore_generators(path: Path, process_group: ProcessGroup) -> None:
    """Give this rank's random number generators the state that the checkpoint has for it, where it was saved
    on as many ranks.
    """
    if not (path / RANDOM_FILE).exists():
        return
    states = read_json(path / RANDOM_FILE).get("ranks")
    if isinstance(states, Sequence) and len(states) == process_group.world_size:
        restore_random_state(cast("Mapping[str, JSON]", states[process_group.rank]))


def read_state(path: Path) -> dict[str, JSON]:
    """A checkpoint's `state.json`."""
    state = read_json(path / STATE_FILE)
    return with_current_names({name: _finite_or_not(value) for name, value in state.items()})


def write_run_file(folder: Path, config: RunConfig) -> None:
    """Write `run.json`: every setting as it was resolved, and the versions that the run was made with."""
    (folder / RUN_FILE).write_text(run_text(config), encoding="utf-8")


def _finite_or_not(value: JSON) -> JSON:
    if isinstance(value, Mapping):
        if value.keys() == {"float"} and isinstance(value["float"], str):
            return float(value["float"])
        return {name: _finite_or_not(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite_or_not(item) for item in value]
    return value


def _sealed(folder: Path, paths: Sequence[Path]) -> dict[str, FileEntry]:
    """Put files under `folder` on the disk; their entries for the manifest.

    The disk is told of all files at once, and the hashes are computed meanwhile: of ten small files 6 ms
    instead of 25.
    """
    with ThreadPoolExecutor(SYNC_THREADS) as pool:
        syncing = [pool.submit(sync_file, path) for path in paths]
        entries = file_entries(folder, paths)
        for one in syncing:
            one.result()
    return entries


def _complete(folder: Path, parts: Iterable[Mapping[str, FileEntry]]) -> None:
    """Write the manifest of what all ranks wrote, and put the folders' names on the disk."""
    files: dict[str, FileEntry] = {}
    for rank, entries in enumerate(parts):
        for name, entry in entries.items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != entry["size"]:
                raise CheckpointError(
                    f"{folder.parent}: what rank {rank} wrote ({name}) is not to be seen by rank 0; output_dir must lie on a file system "
                    "that all machines share. Earlier checkpoints are untouched"
                )
            files[name] = entry
    sync_file(folder / OPTIMIZER_FOLDER)
    sync_file(write_manifest(folder, dict(sorted(files.items()))))
    sync_file(folder)
