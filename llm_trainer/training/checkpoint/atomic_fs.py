"""What a save asks of the file system: data on the disk, a name taken in one rename, nothing left of what
failed, and errors in words.
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
    """Put a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_place(temporary: Path, place: Path) -> None:
    """Rename a finished folder to its name; an earlier holder steps aside first, and goes once the name is on
    the disk.
    """
    replaced = place.with_name(f"{REPLACED_PREFIX}{place.name}")
    if place.exists():
        place.rename(replaced)
    try:
        temporary.rename(place)
    except OSError:
        if replaced.exists():
            replaced.rename(place)
        raise
    try:
        sync_file(place.parent)
    finally:
        discard(replaced)


def copy_checkpoint(source: Path, place: Path) -> list[str]:
    """Copy a checkpoint folder to a name that is free, where the copy is whole; returns what is wrong with it
    otherwise, a line each.

    Raises CheckpointError for what the disk refuses.
    """
    temporary = place.with_name(f"{TEMPORARY_PREFIX}{place.name}")
    needed = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    with removed_on_failure(temporary), told_as_checkpoint_error(place, needed):
        require_space(place, needed)
        shutil.copytree(source, temporary)
        for path in temporary.rglob("*"):
            sync_file(path)
        if problems := verify(temporary):
            remove(temporary)
        else:
            take_place(temporary, place)
    return problems


def discard(folder: Path) -> None:
    """Delete a checkpoint so that a kill midway leaves nothing that bears a checkpoint's name; what stays,
    the next save removes.
    """
    with contextlib.suppress(OSError):
        if folder.exists():
            doomed = folder.with_name(f"{TEMPORARY_PREFIX}{folder.name.lstrip('.')}")
            folder.rename(doomed)
            remove(doomed)


def remove(path: Path) -> None:
    """Delete a file or folder as far as it can be."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)  # what cannot be removed now is a leftover for the next save
    else:
        path.unlink(missing_ok=True)


def require_space(place: Path, needed: int) -> None:
    """Raises OSError as a full disk would, where fewer than `needed` bytes are free."""
    if shutil.disk_usage(place.parent).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def removed_on_failure(temporary: Path) -> Iterator[None]:
    """Within, whatever ends early takes the folder along."""
    try:
        yield
    except BaseException:  # an interrupt too: no litter
        if temporary.exists():
            remove(temporary)
        raise


@contextlib.contextmanager
def told_as_checkpoint_error(place: Path, needed: int) -> Iterator[None]:
    """Turn what the disk refuses into a message; safetensors wraps the system's errors in its own. `needed`:
    bytes of the whole save.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = (
            isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        ) or f"code: {errno.ENOSPC}" in str(error)
        reason = _lack_of_space(place, needed) if full else str(error)
        raise CheckpointError(
            f"{place} could not be saved: {reason}. Earlier checkpoints are untouched"
        ) from error


def _lack_of_space(place: Path, needed: int) -> str:
    free = shutil.disk_usage(place.parent).free
    missing = f", {_megabytes(needed - free)} are missing" if needed > free else ""
    return (
        f"the disk is full: it needs about {_megabytes(needed)}, {_megabytes(free)} are free{missing}; "
        "free some space, lower save_total_limit, or resume with another output_dir"
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
