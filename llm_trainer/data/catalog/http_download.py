"""Files from the network: resumed where an earlier attempt ended, tried again, checked, and in place only
when whole.

A part is kept beside its place as `<name>.part`, with what tells the server's version apart (an ETag) in
`<name>.part.version`. The next attempt, in this run or a later one, asks for the rest by an HTTP range; a
server that has another version by now, or knows no ranges, sends the whole.
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
_BLOCK = 2**18
_ATTEMPTS = 5  # in a row without a byte
_ATTEMPTS_TO_BEGIN = 2  # before there was any
_FIRST_PAUSE_SECONDS = 1.0
_AGAIN = (408, 425, 429, 500, 502, 503, 504)  # statuses that may pass
_NO_CONNECTION = (
    urllib.error.URLError,
    TimeoutError,
    ConnectionError,
    ssl.SSLError,
    http.client.HTTPException,
)


class NoConnectionError(DataError):
    """The server could not be reached: others will not be either."""


@dataclass(frozen=True)
class RemoteFile:
    """A file to fetch: from where, what it is called here (relative), and what is known of it."""

    url: str
    name: str
    size: int | None = None
    sha256: str | None = None


def download(
    remote: RemoteFile, folder: Path, console: Console | None = None, token: str | None = None
) -> Path:
    """Download a file into `folder`, unless it is there already. `token` goes to the server of the url alone.

    Raises NoConnectionError where the server cannot be reached, DataError where it refuses, where the disk
    has no room, and for contents that are not those expected.
    """
    place = safe_path(folder, remote.name)
    if place.is_file() and remote.size in (None, place.stat().st_size):
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    part = _Part(place)
    _check_room(remote, part, place)
    was_resumed = part.size > 0
    with ByteProgress(console, f"fetching {place.name}", remote.size) as progress:
        progress.advance(part.size)
        _fetch_all(remote, part, token, progress)
    differs = _difference(remote, part)
    if differs is None:
        return part.finish()
    part.drop()
    if was_resumed:  # what was there before may have been of another version
        return download(remote, folder, console, token)
    raise DataError(f"what {remote.url} holds is not what was expected ({differs}); it was not kept")


def _difference(remote: RemoteFile, part: _Part) -> str | None:
    """How what has arrived differs from what was expected, or None."""
    if remote.size not in (None, part.size):
        return f"it has {part.size} bytes, not {remote.size}"
    return (
        "its sha256 differs"
        if remote.sha256 not in (None, part.sha256() if remote.sha256 else None)
        else None
    )


class _Part:
    """What has arrived of a file so far."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self.path = place.with_name(f"{place.name}.part")
        self._version = place.with_name(f"{place.name}.part.version")

    @property
    def size(self) -> int:
        """Bytes that are here."""
        return self.path.stat().st_size if self.path.is_file() else 0

    @property
    def version(self) -> str | None:
        """The server's name for the version that this is a part of."""
        return self._version.read_text(encoding="utf-8") if self._version.is_file() else None

    def begin(self, version: str | None) -> None:
        """Start anew."""
        self.drop()
        self.path.touch()
        if version is not None:
            self._version.write_text(version, encoding="utf-8")

    def drop(self) -> None:
        """Forget what is here."""
        self.path.unlink(missing_ok=True)
        self._version.unlink(missing_ok=True)

    def sha256(self) -> str:
        """Of what is here."""
        with self.path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    def finish(self) -> Path:
        """Put it in its place."""
        self._version.unlink(missing_ok=True)
        return self.path.replace(self._place)


def _fetch_all(remote: RemoteFile, part: _Part, token: str | None, progress: ByteProgress) -> None:
    """Attempts until the whole file is here."""
    failures, first = 0, part.size
    while True:
        before, is_hopeless = part.size, False
        try:
            if _attempt(remote, part, token, progress):
                return
            reason = "the connection ended early"
        except urllib.error.HTTPError as error:
            if error.code not in _AGAIN:
                raise DataError(
                    f"{remote.url} answers {error.code} {error.reason}{_hint(error.code)}"
                ) from None
            reason = f"{error.code} {error.reason}"
        except _NO_CONNECTION as error:
            cause = getattr(error, "reason", error)
            reason, is_hopeless = str(cause) or type(cause).__name__, isinstance(cause, socket.gaierror)
        failures = 1 if part.size > before else failures + 1
        if is_hopeless or failures >= (_ATTEMPTS if part.size > first else _ATTEMPTS_TO_BEGIN):
            raise NoConnectionError(f"{remote.url} could not be fetched ({reason})")
        time.sleep(_FIRST_PAUSE_SECONDS * 2 ** (failures - 1))


def _attempt(remote: RemoteFile, part: _Part, token: str | None, progress: ByteProgress) -> bool:
    """One request for what is missing; whether the file is whole afterwards."""
    if part.size and (
        part.size > (remote.size or part.size) or (part.version is None and remote.sha256 is None)
    ):
        part.drop()  # nothing would tell whether the rest fits to it
    if part.size and part.size == remote.size:
        return True
    try:
        with urllib.request.urlopen(_request(remote, part, token), timeout=TIMEOUT_SECONDS) as answer:
            begins = _begins(answer)
            if begins != part.size or answer.status != 206:
                part.begin(answer.headers.get("ETag"))
                if answer.status == 206:
                    return False  # another range than was asked for
            length = answer.headers.get("Content-Length")
            expected = part.size + int(length) if length is not None else remote.size
            with _room(part.path), part.path.open("ab") as opened:
                while block := answer.read(_BLOCK):
                    opened.write(block)
                    progress.advance(len(block))
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        part.drop()  # the server's file is shorter than what is here
        return False
    return expected is None or part.size == expected


def _request(remote: RemoteFile, part: _Part, token: str | None) -> urllib.request.Request:
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


def _begins(answer: http.client.HTTPResponse) -> int:
    """The first byte of what the server sends."""
    found = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range") or "")
    return int(found[1]) if found else 0


@contextlib.contextmanager
def _room(place: Path) -> Iterator[None]:
    """A full disk said in our words."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"no space left for {place}; what was fetched is kept, and the next attempt goes on from there"
        ) from None


def _check_room(remote: RemoteFile, part: _Part, place: Path) -> None:
    free = shutil.disk_usage(place.parent).free
    if remote.size is not None and remote.size - part.size > free:
        raise DataError(
            f"{remote.url} needs {remote.size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in {place.parent}; free some first"
        )


def _hint(status: int) -> str:
    return "; log in with HF_TOKEN, having accepted its terms on its page" if status in (401, 403) else ""
