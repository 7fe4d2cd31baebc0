"""A lock on a run folder: two processes that trained in the same one would mix their records and move each
other's checkpoints away.

The lock is the operating system's (`flock`), on the file `run.lock`. It ends with the process that holds it,
however that dies, so nothing has to be cleaned up, and a file that was left behind does not block the next
run. The file's text names the holder for the error message and means nothing else.

On a network file system the lock works as far as that supports `flock`: NFS (version 3 with its lock service,
version 4) and Lustre mounted with `flock` do so between machines; where a file system lacks locks, the run
continues without one and says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from llm_trainer.errors import CheckpointError
from llm_trainer.run_dir import LOCK_FILE

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_LARGEST_RECORD = 4096
# Folder → descriptor of its lock file and the number of RunLocks on it in this process.
_held: dict[Path, tuple[int, int]] = {}


class RunLock:
    """The lock on one run folder. A context manager: the block runs with the lock held.

    A process may hold several for the same folder, as a run and the command that started it do. The folder is
    free when the last of them is released.

    Args:
        run_folder: The run folder. It is made if it does not exist.

    Attributes:
        problem: Why the folder could not be locked at all; None where it is locked.

    Raises:
        CheckpointError: If another process holds the lock; the message names it.
    """

    def __init__(self, run_folder: Path) -> None:
        run_folder.mkdir(parents=True, exist_ok=True)
        self._folder: Path | None = run_folder.resolve()
        self.problem: str | None = None
        descriptor, count = _held.get(self._folder, (-1, 0))
        if not count:
            descriptor, self.problem = _acquire(run_folder)
        _held[self._folder] = (descriptor, count + 1)

    def release(self) -> None:
        """Give this lock back. A second call does nothing."""
        if self._folder is None:
            return
        descriptor, count = _held.pop(self._folder)
        if count > 1:
            _held[self._folder] = (descriptor, count - 1)
        elif descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._folder = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def check_not_locked(run_folder: Path) -> None:
    """Refuse a folder that another process trains in, early in a start. Makes and changes nothing.

    Args:
        run_folder: The run folder. It need not exist.

    Raises:
        CheckpointError: If another process holds the lock.
    """
    if (run_folder / LOCK_FILE).is_file():
        RunLock(run_folder).release()


def _acquire(run_folder: Path) -> tuple[int, str | None]:
    """The descriptor of the locked file, or -1 and the reason why there is no lock."""
    if fcntl is None:
        return -1, "this system has no flock"
    path = run_folder / LOCK_FILE
    try:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:  # another user's, which can be locked all the same
            descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        return -1, error.strerror or str(error)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(os.pread(descriptor, _LARGEST_RECORD, 0))
        os.close(descriptor)
        raise CheckpointError(
            f"the run folder {run_folder} is in use by {holder}; wait until that has ended, stop it, or "
            "choose another --output_dir"
        ) from None
    except OSError as error:  # a file system without locks
        os.close(descriptor)
        return -1, error.strerror or str(error)
    record = {"host": socket.gethostname(), "pid": os.getpid(), "time": round(time.time())}
    with contextlib.suppress(OSError):  # a full disk: the lock counts, its text is only for the message
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{json.dumps(record)}\n".encode(), 0)
    return descriptor, None


def _holder(text: bytes) -> str:
    """The process that a lock file names."""
    try:
        record = json.loads(text)
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(int(record["time"])))
        return f"process {int(record['pid'])} on {str(record['host'])[:100]!r} (since {started})"
    except (ValueError, TypeError, KeyError, OverflowError, OSError):
        return "another process"


def _close_in_child() -> None:
    """A forked child does not keep a lock that its dead parent held."""
    for descriptor, _ in _held.values():
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
