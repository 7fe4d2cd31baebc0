"""File-system operations that a save is built from: sync, atomic replacement, clean-up, readable errors.

Each of them leaves either the old folder or the new one under a name, whenever the process is killed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from llm_trainer.config import CheckpointError
from llm_trainer.run_dir import REPLACED_PREFIX, TEMPORARY_PREFIX, verify


def sync_file(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_atomically(temporary: Path, target: Path) -> None:
    """Rename a finished folder to its final name.

    A folder that already has the name is renamed first, and deleted once the new name is on the disk.

    Args:
        temporary: The finished folder.
        target: Its final path, in the same parent folder.

    Raises:
        OSError: If the folder cannot be renamed. The earlier folder then has its name again.
    """
    replaced = target.with_name(f"{REPLACED_PREFIX}{target.name}")
    if target.exists():
        target.rename(replaced)
    try:
        temporary.rename(target)
    except OSError:
        if replaced.exists():
            replaced.rename(target)
        raise
    try:
        sync_file(target.parent)
    finally:
        discard(replaced)


def copy_checkpoint(source: Path, target: Path) -> list[str]:
    """Copy a checkpoint folder, and verify the copy before it gets its name.

    Args:
        source: The checkpoint to copy.
        target: The path of the copy, which must not exist yet.

    Returns:
        What is wrong with the copy, one line each. It is deleted then.

    Raises:
        CheckpointError: If the disk is full or refuses the files.
    """
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
    needed = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    with remove_on_failure(temporary), translate_disk_errors(target, needed):
        require_space(target, needed)
        shutil.copytree(source, temporary)
        for path in temporary.rglob("*"):
            sync_file(path)
        if problems := verify(temporary):
            remove(temporary)
        else:
            replace_atomically(temporary, target)
    return problems


def discard(folder: Path) -> None:
    """Delete a checkpoint. A kill midway leaves nothing under a checkpoint's name.

    The folder gets a temporary name first. What could not be deleted is deleted by the next save.
    """
    with contextlib.suppress(OSError):
        if folder.exists():
            doomed = folder.with_name(f"{TEMPORARY_PREFIX}{folder.name.lstrip('.')}")
            folder.rename(doomed)
            remove(doomed)


def remove(path: Path) -> None:
    """Delete a file or a folder as far as possible."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)  # the next save deletes what is left
    else:
        path.unlink(missing_ok=True)


def require_space(target: Path, needed: int) -> None:
    """Check that there is space on the disk before a save begins.

    Args:
        target: The folder that is to be written.
        needed: Bytes that it needs.

    Raises:
        OSError: With ENOSPC, as a full disk would raise, if fewer bytes are free.
    """
    if shutil.disk_usage(target.parent).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def remove_on_failure(temporary: Path) -> Iterator[None]:
    """Delete a temporary folder if the block raises.

    Args:
        temporary: The folder. It need not exist.
    """
    try:
        yield
    except BaseException:  # an interrupt leaves nothing behind either
        if temporary.exists():
            remove(temporary)
        raise


@contextlib.contextmanager
def translate_disk_errors(target: Path, needed: int) -> Iterator[None]:
    """Turn what the disk refuses in the block into a CheckpointError that says what to do.

    Args:
        target: The folder that is saved.
        needed: Bytes of the complete save, over all ranks.

    Raises:
        CheckpointError: For the system's errors, also where safetensors wraps them in its own.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        is_full = (
            isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        ) or f"code: {errno.ENOSPC}" in str(error)
        reason = _lack_of_space(target, needed) if is_full else str(error)
        raise CheckpointError(
            f"{target} could not be saved: {reason}. Earlier checkpoints are untouched"
        ) from error


def _lack_of_space(target: Path, needed: int) -> str:
    free = shutil.disk_usage(target.parent).free
    missing = f", {_megabytes(needed - free)} are missing" if needed > free else ""
    return (
        f"the disk is full: it needs about {_megabytes(needed)}, {_megabytes(free)} are free{missing}; "
        "free some space, lower save_total_limit, or resume with another output_dir"
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
