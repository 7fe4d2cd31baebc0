"""Downloads that are resumed, retried and verified; a file appears only when it is complete.

What has arrived of a file is kept next to its final path as `<name>.part`, with the identifier of the
server's version (an ETag) in `<name>.part.version`. The next attempt, in this process or a later one,
requests the rest with an HTTP range. A server that has another version by now, or does not support ranges,
sends the complete file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import re
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from llm_trainer.data.catalog.archives import safe_path
from llm_trainer.data.progress import ByteProgress
from llm_trainer.errors import DataError

TIMEOUT_SECONDS = 30.0
_BLOCK_BYTES = 2**18
_MAX_ATTEMPTS = 5  # in a row that bring no byte
_MAX_FIRST_ATTEMPTS = 2  # in a row, before any byte has arrived
_FIRST_PAUSE_SECONDS = 1.0
_RETRY_STATUSES = (408, 425, 429, 500, 502, 503, 504)
_CONNECTION_ERRORS = (
    urllib.error.URLError,
    TimeoutError,
    ConnectionError,
    ssl.SSLError,
    http.client.HTTPException,
)


class NoConnectionError(DataError):
    """The server could not be reached, so other downloads will probably fail too."""


@dataclass(frozen=True)
class RemoteFile:
    """A file to download.

    Attributes:
        url: The file's address.
        name: The path to save it as, relative to a folder.
        size: The expected bytes, if known.
        sha256: The expected hash in hexadecimal, if known.
    """

    url: str
    name: str
    size: int | None = None
    sha256: str | None = None


def download(
    remote: RemoteFile, folder: Path, console: Console | None = None, token: str | None = None
) -> Path:
    """Download a file, unless it is already there.

    Args:
        remote: The file.
        folder: The folder to save it in.
        console: Where progress is shown.
        token: A bearer token, which is sent to the host of the url only.

    Returns:
        The path of the file.

    Raises:
        NoConnectionError: The server cannot be reached.
        DataError: The server answers with an error, the disk is full, or the contents are not those expected.
    """
    target = safe_path(folder, remote.name)
    if target.is_file() and remote.size in (None, target.stat().st_size):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _PartialFile(target)
    _check_free_space(remote, part, target)
    was_resumed = part.size > 0
    with ByteProgress(console, f"downloading {target.name}", remote.size) as progress:
        progress.advance(part.size)
        _download_all(remote, part, token, progress)
    mismatch = _mismatch(remote, part)
    if mismatch is None:
        return part.finish()
    part.discard()
    if was_resumed:  # the part that was there may have been of another version
        return download(remote, folder, console, token)
    raise DataError(f"the contents of {remote.url} are not those expected ({mismatch}); nothing was kept")


def _mismatch(remote: RemoteFile, part: _PartialFile) -> str | None:
    """How what has arrived differs from what was expected, or None."""
    if remote.size not in (None, part.size):
        return f"it has {part.size} bytes, not {remote.size}"
    return (
        "its sha256 differs"
        if remote.sha256 not in (None, part.sha256() if remote.sha256 else None)
        else None
    )


class _PartialFile:
    """What has arrived of a file so far."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self.path = target.with_name(f"{target.name}.part")
        self._version = target.with_name(f"{target.name}.part.version")

    @property
    def size(self) -> int:
        """Bytes that have arrived."""
        return self.path.stat().st_size if self.path.is_file() else 0

    @property
    def version(self) -> str | None:
        """The server's identifier of the version that this is a part of."""
        return self._version.read_text(encoding="utf-8") if self._version.is_file() else None

    def restart(self, version: str | None) -> None:
        """Discard what has arrived and begin with an empty part of this version."""
        self.discard()
        self.path.touch()
        if version is not None:
            self._version.write_text(version, encoding="utf-8")

    def discard(self) -> None:
        """Delete what has arrived."""
        self.path.unlink(missing_ok=True)
        self._version.unlink(missing_ok=True)

    def sha256(self) -> str:
        """Hash what has arrived."""
        with self.path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    def finish(self) -> Path:
        """Rename the part to the final path and return it."""
        self._version.unlink(missing_ok=True)
        return self.path.replace(self._target)


def _download_all(remote: RemoteFile, part: _PartialFile, token: str | None, progress: ByteProgress) -> None:
    """Attempt the download until the file is complete."""
    failures, first = 0, part.size
    while True:
        before, is_hopeless = part.size, False
        try:
            if _attempt(remote, part, token, progress):
                return
            reason = "the connection ended early"
        except urllib.error.HTTPError as error:
            if error.code not in _RETRY_STATUSES:
                raise DataError(
                    f"{remote.url} answered with {error.code} {error.reason}{_hint(error.code)}"
                ) from None
            reason = f"{error.code} {error.reason}"
        except _CONNECTION_ERRORS as error:
            cause = getattr(error, "reason", error)
            reason, is_hopeless = str(cause) or type(cause).__name__, isinstance(cause, socket.gaierror)
        failures = 1 if part.size > before else failures + 1
        if is_hopeless or failures >= (_MAX_ATTEMPTS if part.size > first else _MAX_FIRST_ATTEMPTS):
            raise NoConnectionError(f"{remote.url} could not be downloaded ({reason})")
        time.sleep(_FIRST_PAUSE_SECONDS * 2 ** (failures - 1))


def _attempt(remote: RemoteFile, part: _PartialFile, token: str | None, progress: ByteProgress) -> bool:
    """Send one request for what is missing; return whether the file is complete afterwards."""
    if part.size and (
        part.size > (remote.size or part.size) or (part.version is None and remote.sha256 is None)
    ):
        part.discard()  # nothing would show whether the rest is of the same version
    if part.size and part.size == remote.size:
        return True
    try:
        with urllib.request.urlopen(_request(remote, part, token), timeout=TIMEOUT_SECONDS) as answer:
            if _first_byte(answer) != part.size or answer.status != 206:
                part.restart(answer.headers.get("ETag"))
                if answer.status == 206:
                    return False  # not the range that was requested
            length = answer.headers.get("Content-Length")
            expected = part.size + int(length) if length is not None else remote.size
            with _disk_full_errors(part.path), part.path.open("ab") as opened:
                while block := answer.read(_BLOCK_BYTES):
                    opened.write(block)
                    progress.advance(len(block))
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        part.discard()  # the server's file is shorter than what has arrived
        return False
    return expected is None or part.size == expected


def _request(remote: RemoteFile, part: _PartialFile, token: str | None) -> urllib.request.Request:
    request = urllib.request.Request(
        remote.url, headers={"Accept-Encoding": "identity", "User-Agent": "llm-trainer"}
    )
    if part.size:
        request.add_header("Range", f"bytes={part.size}-")
        if part.version is not None and not part.version.startswith("W/"):
            request.add_header("If-Range", part.version)
    if token is not None:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return request


def _first_byte(answer: http.client.HTTPResponse) -> int:
    """The position in the file of the first byte that the server sends."""
    found = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range") or "")
    return int(found[1]) if found else 0


@contextlib.contextmanager
def _disk_full_errors(path: Path) -> Iterator[None]:
    """Turn the error of a full disk into one that explains what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"no space left on the disk for {path}; free some and run the command again, which resumes the "
            "download"
        ) from None


def _check_free_space(remote: RemoteFile, part: _PartialFile, target: Path) -> None:
    free = shutil.disk_usage(target.parent).free
    if remote.size is not None and remote.size - part.size > free:
        raise DataError(
            f"{remote.url} needs {remote.size / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free in "
            f"{target.parent}; free some first"
        )


def _hint(status: int) -> str:
    return "; accept the dataset's terms on its page and log in with HF_TOKEN" if status in (401, 403) else ""
