"""Publishes a result completely or not at all: it is staged in a hidden folder and then moved."""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from llm_trainer.data.metadata import METADATA_FILE, Metadata
from llm_trainer.data.pipeline.document_index import REJECTED_FILE
from llm_trainer.data.pipeline.summary import HISTOGRAM_FILE, SUMMARY_FILE
from llm_trainer.data.sources.presplit_source import SPLIT_FILE_NAMES
from llm_trainer.data.token_shards import SHARD_SUFFIX
from llm_trainer.errors import DataError

_PREFIX = ".preparing-"
_LOCK = ".prepare.lock"
_FORMATS = ((".txt", ".jsonl"), (".jsonl", ".txt"))
# The text file of a split → the same split's file in the other format.
OTHER_FORMAT = {
    f"{name}{suffix}": f"{name}{other}" for name in SPLIT_FILE_NAMES.values() for suffix, other in _FORMATS
}


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Lock the output folder: of two preparations at once, the second waits and then finds the result.

    Raises:
        DataError: The folder is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK).open("w")
    except OSError as error:
        raise DataError(
            f"cannot write to {folder}: {error.strerror or error}; choose another --output_dir"
        ) from None
    with lock:
        # Windows and some network file systems have no such lock.
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """A new folder inside `folder`, removed at the end; those of interrupted runs are removed first."""
    for old in folder.glob(f"{_PREFIX}*"):
        shutil.rmtree(old, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Turn the error of a full disk into a DataError that explains it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder).free / 1e6
        raise DataError(
            f"no space left for {folder} ({free:.0f} MB are free); free some, or choose another --output_dir"
        ) from None


def publish(staging: Path, folder: Path, metadata: Metadata) -> None:
    """Move a result into `folder`; metadata.json is written last, and until then it is not prepared.

    Args:
        staging: The result, next to the files that it replaces.
        folder: The output folder.
        metadata: Its new metadata.

    Raises:
        DataError: `folder/dataset` holds files of another program.
    """
    old = folder / "dataset"
    if old.exists():
        foreign = [file.name for file in old.iterdir() if file.suffix not in (SHARD_SUFFIX, ".partial")]
        if foreign:
            raise DataError(
                f"{old} holds other files ({', '.join(sorted(foreign)[:5])});"
                " choose another --output_dir, or remove them"
            )
    (folder / METADATA_FILE).unlink(missing_ok=True)
    if old.exists():
        shutil.rmtree(old)
    # Files that the new result may not have.
    for name in (SUMMARY_FILE, HISTOGRAM_FILE, REJECTED_FILE):
        (folder / name).unlink(missing_ok=True)
    for path in sorted(staging.iterdir()):
        path.replace(folder / path.name)
        if path.name in OTHER_FORMAT:
            (folder / OTHER_FORMAT[path.name]).unlink(missing_ok=True)
    metadata.write(folder)
