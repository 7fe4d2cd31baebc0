"""A file that records are appended to, each of them as a whole or not at all.

A disk that fills up in the middle of a write would leave half a line, which the next line would continue.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path

from llm_trainer.errors import LLMTrainerError


class AppendFile:
    """Appends records to a file, unbuffered: what `write` returned from is in the file.

    Args:
        path: The file. It is created if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    @property
    def closed(self) -> bool:
        """Whether the file is closed."""
        return self._descriptor is None

    def write(self, record: bytes | str) -> int:
        """Append a record.

        Args:
            record: Bytes, or text to be encoded in utf-8.

        Returns:
            The number of bytes.

        Raises:
            LLMTrainerError: If it could not be written. The file then ends as it did before.
        """
        assert self._descriptor is not None, "the file is closed"
        data = record.encode("utf-8", "backslashreplace") if isinstance(record, str) else record
        before = os.fstat(self._descriptor).st_size
        written = 0
        try:
            while written < len(data):
                written += os.write(self._descriptor, data[written:])
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, before)
            raise LLMTrainerError(self._problem(error, len(data))) from error
        return written

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _problem(self, error: OSError, size: int) -> str:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return f"{self.path} could not be written: {error.strerror or error}"
        free = 0
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(self.path.parent).free
        return (
            f"no space left on the disk for {self.path}: {size:,} bytes were to be added, {free:,} are free; "
            "free some space and resume with --resume auto. Earlier lines and checkpoints are intact"
        )
