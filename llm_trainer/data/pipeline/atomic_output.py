"""A result appears whole or not at all: work in a hidden folder, move it into place, metadata.json last."""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from llm_trainer.data.metadata import METADATA_FILE, Metadata
from llm_trainer.data.pipeline.document_index import REJECTED_FILE
from llm_trainer.data.pipeline.summary import PICTURE_FILE, SUMMARY_FILE
from llm_trainer.data.sources.presplit_source import FILE_NAMES
from llm_trainer.data.token_shards import SUFFIX
from llm_trainer.errors import DataError

_PREFIX = ".preparing-"
_LOCK = ".prepare.lock"
_FORMS = ((".txt", ".jsonl"), (".jsonl", ".txt"))
OTHER_FORM = {
    f"{name}{form}": f"{name}{other}" for name in FILE_NAMES.values() for form, other in _FORMS
}  # of a split's texts


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: of two preparations at once the second waits and finds the result. Raises
    DataError where it cannot write.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK).open("w")
    except OSError as error:
        raise DataError(
            f"cannot write to {folder}: {error.strerror or error}; choose another --output_dir"
        ) from None
    with lock:
        with contextlib.suppress(
            ImportError, OSError
        ):  # no such lock on Windows and some network file systems
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A fresh workplace inside `folder`, removed afterwards; those that killed runs left are removed first."""
    for left in folder.glob(f"{_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)
    workplace = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
    try:
        yield workplace
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


@contextlib.contextmanager
def clear_about_space(folder: Path) -> Iterator[None]:
    """Turns a full disk into an error that says so."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder).free / 1e6
        raise DataError(
            f"no space left for {folder} ({free:.0f} MB are free); free some, or choose another --output_dir"
        ) from None


def publish(workplace: Path, folder: Path, metadata: Metadata) -> None:
    """Move what `workplace` holds into `folder`; until metadata.json is written at the end, the folder does
    not pass for prepared.

    Raises DataError where `folder/dataset` holds files that are not ours.
    """
    old = folder / "dataset"
    if old.exists():
        foreign = [file.name for file in old.iterdir() if file.suffix not in (SUFFIX, ".partial")]
        if foreign:
            raise DataError(
                f"{old} holds other files ({', '.join(sorted(foreign)[:5])}); choose another --output_dir, or remove them"
            )
    (folder / METADATA_FILE).unlink(missing_ok=True)
    if old.exists():
        shutil.rmtree(old)
    for name in (SUMMARY_FILE, PICTURE_FILE, REJECTED_FILE):
        (folder / name).unlink(
            missing_ok=True
        )  # of an older result, which may have had what this one has not
    for made in sorted(workplace.iterdir()):
        made.replace(folder / made.name)
        if made.name in OTHER_FORM:
            (folder / OTHER_FORM[made.name]).unlink(missing_ok=True)
    metadata.write(folder)
