"""Saves and restores everything that is state. A kill at any moment leaves checkpoints that can be trusted.

A save writes into `.tmp-<name>` next to the final folder, syncs every file to the disk, writes the manifest
of sizes and hashes last, and renames the folder. Before the rename nothing could be mistaken for a
checkpoint; after it the checkpoint is complete. Where the name exists already (`best_model`, or a step that
is saved again), the earlier folder is renamed to `.old-<name>` first, and readers accept it for the moment in
which it is the only one. Older checkpoints are removed only after the new one was verified under its name.

Each rank writes what it holds (snapshot.py). The main rank makes the folder, and completes it when all ranks
have reported their files. All of this may happen in a thread while the run trains (async_writer.py): from
copies in host memory, in a process group of its own, one save after another. The next `wait` or save raises
what failed there, on all ranks alike.

A checkpoint is a folder: weights and `config.json` in Hugging Face's format, the tokenizer, `optimizer/`,
`state.json`, `run.json`, `random.json`, `manifest.json`. Nothing is pickled. The alternative not taken,
`torch.save`, needs unpickling, which executes whatever a stranger put into the file.
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
from llm_trainer.training.checkpoint.async_writer import AsyncWriter
from llm_trainer.training.checkpoint.atomic_fs import (
    discard,
    remove,
    remove_on_failure,
    replace_atomically,
    require_space,
    sync_file,
    translate_disk_errors,
)
from llm_trainer.training.checkpoint.optimizer_state import load_optimizer_state
from llm_trainer.training.checkpoint.rng_state import set_rng_state
from llm_trainer.training.checkpoint.snapshot import (
    OPTIMIZER_SCALARS,
    CheckpointData,
    HostBuffers,
    SavedTokenizer,
    Snapshot,
    available_host_memory,
    has_spare_core,
    run_json,
    take_snapshot,
    versions,
    with_new_metadata,
)
from llm_trainer.training.state import with_current_names

if TYPE_CHECKING:
    from llm_trainer.training.checkpoint.remote import RemoteRun

__all__ = [
    "CheckpointData", "CheckpointStore", "Progress", "SavedTokenizer",
    "read_state", "restore", "restore_rng_state", "versions", "write_run_file",
]  # fmt: skip

# A tensor's entry in a file's header, a file's entry in the manifest, and the rest of a file's last block.
_HEADER_BYTES, _ENTRY_BYTES, _BLOCK_BYTES = 160, 160, 4096
# A smaller save takes about as long as starting one in the background: tens of milliseconds.
ASYNC_MIN_BYTES = 64 << 20
SYNC_THREADS = 8
Asynchronous = Literal["auto", "on", "off"]
_RUN_RECORDS = (
    RUN_FILE,
    METRICS_FILE,
    OPERATIONS_FILE,
    LOGS_FOLDER,
    WANDB_ID_FILE,
    "report.html",
    "report.json",
)


class Progress(IntEnum):
    """State of asynchronous saves on a rank. Over several ranks the largest value counts."""

    NOTHING, WRITTEN, BUSY, FAILED = range(4)


class CheckpointStore:
    """The checkpoints of one run folder.

    Args:
        run_folder: The run folder.
        save_total_limit: How many of the newest lasting checkpoints are kept (None: all). best_model and
            final_model are never removed.
        ephemeral_limit: How many ephemeral checkpoints are kept.
        asynchronous: Whether `save`, `save_ephemeral` and `save_best` return once there are copies in host
            memory, and write in the background. `auto` does so where it saves time (a large state, and a
            processor core to spare) and the copies fit.
        remote: Where every complete checkpoint is uploaded.
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
        self._writer, self._buffers = AsyncWriter(), HostBuffers()
        self._written: list[Path] = []
        self._writer_group: ProcessGroup | None = None  # the writer's own group of the same ranks
        self._snapshot: Snapshot | None = None  # what the writer is writing

    def begin(self, resumed_step: int | None) -> Path | None:
        """Prepare the run folder: move what this run does not continue to `earlier-<n>/`.

        That is what the run would take for its own: for a new run every checkpoint, the metrics and the
        logs; for a resumed one the checkpoints past its step. Nothing is deleted.

        Args:
            resumed_step: The step that the run resumes from; None for a new run.

        Returns:
            The folder that files were moved to; None if there were none to move.
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
            stale += [self.run_folder / name for name in _RUN_RECORDS if (self.run_folder / name).exists()]
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

    def save(self, data: CheckpointData, step: int) -> Path:
        """Write `checkpoint-<step>`, and remove those past the limit.

        Args:
            data: What is saved.
            step: Optimizer updates so far.

        Returns:
            The checkpoint's path. It may exist only later (see `wait`).

        Raises:
            CheckpointError: If this save, or an earlier one in the background, failed. Earlier checkpoints
                are
                untouched.
        """
        return self._save(checkpoint_name(step), data, step)

    def save_ephemeral(self, data: CheckpointData, step: int) -> Path:
        """Write `recent-<step>`, which later ones of its kind replace. Otherwise as `save`."""
        return self._save(ephemeral_name(step), data, step)

    def save_best(self, data: CheckpointData) -> Path:
        """Write or replace `best_model`. The caller decides when a model is the best. Otherwise as `save`."""
        return self._save(BEST_MODEL, data, data.step)

    def save_emergency(self, data: CheckpointData, step: int) -> Path:
        """Write `emergency-<step>`: a checkpoint between two regular ones, for a run that has to stop now.

        Args:
            data: What is saved.
            step: Optimizer updates so far.

        Returns:
            The checkpoint's path. It exists on return.

        Raises:
            CheckpointError: If the save failed; also, once it is written, if an earlier one in the background
                failed.
        """
        self._writer.wait()
        path = self._write_now(emergency_name(step), data, step)
        self._collect()
        return path

    def save_final(self, data: CheckpointData) -> Path:
        """Write or replace `final_model`. It exists on return. Otherwise as `save`."""
        self._collect()
        return self._write_now(FINAL_MODEL, data, data.step)

    @property
    def progress(self) -> Progress:
        """State of what this rank was to write since the last `wait`."""
        if self._writer.has_failed:
            return Progress.FAILED
        if self._writer.is_busy:
            return Progress.BUSY
        return Progress.WRITTEN if self._written or self._writer.has_results else Progress.NOTHING

    def wait(self) -> list[Path]:
        """Wait for saves in the background.

        Returns:
            The checkpoints written since the last call.

        Raises:
            CheckpointError: If one of them failed.
        """
        self._collect()
        written, self._written = self._written, []
        return written

    def finish_uploads(self) -> None:
        """Wait until the remote copy is complete.

        Raises:
            CheckpointError: If it cannot be completed.
        """
        if self.remote is not None:
            self.remote.finish()

    def _collect(self) -> None:
        self._snapshot = None
        self._written += self._writer.collect()

    def close(self, process_group: ProcessGroup) -> str | None:
        """End the run's saves, also after an error.

        A single process waits for a save in the background. Several ranks do not, since another rank may be
        gone.

        Args:
            process_group: The ranks.

        Returns:
            What went wrong with a save in the background; None if nothing did.
        """
        if process_group.world_size > 1 and self.progress == Progress.BUSY:
            return None
        try:
            self._collect()
        except CheckpointError as error:
            return str(error)
        return None

    def _save(self, name: str, data: CheckpointData, step: int) -> Path:
        """Save now, or in the background. A save of the same values uses the copies that exist; other copies
        must have been written first.
        """
        if not self._saves_in_background(data):
            self._collect()
            return self._write_now(name, data, step)
        if self._snapshot is not None and self._snapshot.matches(data):
            snapshot = with_new_metadata(self._snapshot, data, step)
        else:
            self._collect()
            snapshot = self._snapshot = take_snapshot(data, step, self._buffers)
        group = self._writer_group = self._writer_group or data.process_group.new_group()
        self._writer.submit(lambda: self._write(name, snapshot, group))
        return self.run_folder / name

    def _write_now(self, name: str, data: CheckpointData, step: int) -> Path:
        path = self._write(name, take_snapshot(data, step), data.process_group)
        self._written.append(path)
        return path

    def _saves_in_background(self, data: CheckpointData) -> bool:
        if self.asynchronous != "auto":
            return self.asynchronous == "on"
        size = data.nbytes
        lacks_memory = not self._buffers.is_allocated and size > available_host_memory() // 2
        largest, is_unfit = data.process_group.all_reduce_max(
            [size, lacks_memory or not has_spare_core(data)]
        )
        return largest >= ASYNC_MIN_BYTES and not is_unfit

    def _write(self, name: str, snapshot: Snapshot, process_group: ProcessGroup) -> Path:
        """Write a checkpoint, each rank its part. A collective call in this process group."""
        target, temporary = self.run_folder / name, self.run_folder / f"{TEMPORARY_PREFIX}{name}"
        needed = int(process_group.all_reduce_sum([_bytes_on_disk(snapshot)])[0])
        with remove_on_failure(temporary) if process_group.is_main else contextlib.nullcontext():

            def begin() -> list[Path]:
                with translate_disk_errors(target, needed):
                    return self._begin_folder(snapshot, target, temporary, needed)

            def write_part() -> str:
                with translate_disk_errors(target, needed):
                    files = [*(text_files or []), *snapshot.write(temporary)]
                    return json.dumps(_sync_and_hash(temporary, files))

            def complete() -> None:
                with translate_disk_errors(target, needed):
                    _complete(temporary, [json.loads(entries) for entries in parts])
                    replace_atomically(temporary, target)

            text_files = process_group.run_on_main(begin)
            parts = process_group.run_on_all(write_part)
            process_group.run_on_main(complete)
        if process_group.is_main:
            # The save has succeeded. The next one removes what cannot be removed now.
            with contextlib.suppress(OSError):
                self._rotate(target)
            if self.remote is not None:
                self.remote.queue_upload(name)
        return target

    def _begin_folder(self, snapshot: Snapshot, target: Path, temporary: Path, needed: int) -> list[Path]:
        """Make the folder and write the files that are not tensors; returns them."""
        self.run_folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        require_space(target, needed)
        temporary.mkdir()
        (temporary / OPTIMIZER_FOLDER).mkdir()
        texts = _text_bytes(snapshot)
        for name, text in snapshot.text_files.items():
            (temporary / name).write_text(text, encoding="utf-8")
        if snapshot.tokenizer is not None:
            snapshot.tokenizer.save(temporary)  # its size is known only now
        require_space(target, needed - texts)
        return [path for path in temporary.rglob("*") if path.is_file()]

    def _rotate(self, newest: Path) -> None:
        """Remove checkpoints past the limits, oldest first, once the newest is known to be complete.

        Its hashes were just computed from the files on the disk, so only the sizes are compared.
        """
        if verify(newest, contents=False):
            return
        numbered = [
            one.path
            for one in list_checkpoints(self.run_folder)
            if one.path.name not in (BEST_MODEL, FINAL_MODEL)
        ]
        ephemeral = [path for path in numbered if path.name.startswith(EPHEMERAL_PREFIX)]
        lasting = [path for path in numbered if path not in ephemeral]
        limit = len(lasting) if self.save_total_limit is None else max(1, self.save_total_limit)
        for path in [*ephemeral[max(1, self.ephemeral_limit) :], *lasting[limit:]]:
            discard(path)

    def _remove_leftovers(self) -> None:
        """Remove what interrupted saves left, and restore the name of an earlier folder whose replacement is
        missing.
        """
        for path in self.run_folder.glob(f"{REPLACED_PREFIX}*"):
            successor = path.with_name(path.name.removeprefix(REPLACED_PREFIX))
            if successor.exists():
                discard(path)
            else:
                path.rename(successor)
        for path in self.run_folder.glob(f"{TEMPORARY_PREFIX}*"):
            remove(path)


def restore(
    path: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], *, verified: bool = False
) -> dict[str, JSON]:
    """Load a checkpoint into a model and its optimizers, bit-exactly. The optimizers' settings stay.

    Args:
        path: The checkpoint folder.
        model: The model, full or sharded.
        optimizers: Its optimizers.
        verified: The caller has just verified the folder.

    Returns:
        The contents of state.json, under the names of this version.

    Raises:
        CheckpointError: If the checkpoint is damaged or does not fit.
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


def restore_rng_state(path: Path, process_group: ProcessGroup) -> None:
    """Restore this rank's random number generators, if the checkpoint was saved on the same number of ranks.

    Args:
        path: The checkpoint folder.
        process_group: The ranks.
    """
    if not (path / RANDOM_FILE).exists():
        return
    states = read_json(path / RANDOM_FILE).get("ranks")
    if isinstance(states, Sequence) and len(states) == process_group.world_size:
        set_rng_state(cast("Mapping[str, JSON]", states[process_group.rank]))


def read_state(path: Path) -> dict[str, JSON]:
    """The contents of a checkpoint's `state.json`, under the names of this version.

    Args:
        path: The checkpoint folder.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    state = read_json(path / STATE_FILE)
    return with_current_names({name: _decode_floats(value) for name, value in state.items()})


def write_run_file(folder: Path, config: RunConfig) -> None:
    """Write `run.json`: every setting as it was resolved, and the versions that the run was made with.

    Args:
        folder: The run folder.
        config: The settings.
    """
    (folder / RUN_FILE).write_text(run_json(config), encoding="utf-8")


def _decode_floats(value: JSON) -> JSON:
    if isinstance(value, Mapping):
        if value.keys() == {"float"} and isinstance(value["float"], str):
            return float(value["float"])
        return {name: _decode_floats(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_decode_floats(item) for item in value]
    return value


def _bytes_on_disk(snapshot: Snapshot) -> int:
    """What this rank's part of a checkpoint takes on the disk, without the tokenizer."""
    tensors = len(snapshot.weights) + len(snapshot.optimizer)
    files = len(snapshot.files) + bool(snapshot.optimizer) + 1  # and the manifest
    return (
        snapshot.nbytes
        + tensors * _HEADER_BYTES
        + files * (_BLOCK_BYTES + _ENTRY_BYTES)
        + _text_bytes(snapshot)
    )


def _text_bytes(snapshot: Snapshot) -> int:
    texts = snapshot.text_files.values()
    return sum(len(text.encode()) + _BLOCK_BYTES + _ENTRY_BYTES for text in texts)


def _sync_and_hash(folder: Path, paths: Sequence[Path]) -> dict[str, FileEntry]:
    """Flush files under `folder` to the disk; returns their entries for the manifest.

    All files are flushed at once while the hashes are computed: 6 ms instead of 25 for ten small files.
    """
    with ThreadPoolExecutor(SYNC_THREADS) as pool:
        syncing = [pool.submit(sync_file, path) for path in paths]
        entries = file_entries(folder, paths)
        for future in syncing:
            future.result()
    return entries


def _complete(folder: Path, parts: Iterable[Mapping[str, FileEntry]]) -> None:
    """Write the manifest of what all ranks wrote, and flush the folders' entries to the disk."""
    files: dict[str, FileEntry] = {}
    for rank, entries in enumerate(parts):
        for name, entry in entries.items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != entry["size"]:
                raise CheckpointError(
                    f"{folder.parent}: rank 0 cannot see {name}, which rank {rank} wrote; output_dir must "
                    "be on a file system that all machines share. Earlier checkpoints are untouched"
                )
            files[name] = entry
    sync_file(folder / OPTIMIZER_FOLDER)
    sync_file(write_manifest(folder, dict(sorted(files.items()))))
    sync_file(folder)
