"""Safe unpacking of archives from untrusted sources.

Nothing is written outside the target folder, nothing but regular files, and no more than an honest archive
would need. zip and tar (plain, or compressed with gzip, bzip2, xz or zstd) are recognized by their first
bytes. An archive is rejected completely, with the name of the member, for `..`, absolute names, links,
devices and pipes, duplicate names and encryption, and for unpacking to far more than its own size (a "zip
bomb"). The bytes that are written count, not what headers claim. Files get this user's default permissions.
"""

from __future__ import annotations

import errno
import io
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from llm_trainer.data.sources import file_io
from llm_trainer.data.sources.file_io import FileRange
from llm_trainer.errors import DataError

_MAGICS = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
_TAR_MAGIC = (257, b"ustar")
_ZIP_MAGICS = (b"PK\x03\x04", b"PK\x05\x06")
# Bytes of a tar's extended header; without a limit, tarfile would allocate whatever a header claims.
_MAX_HEADER_BYTES = 2**20
_DAMAGE_ERRORS = (
    *file_io.READ_ERRORS,
    zipfile.BadZipFile,
    tarfile.TarError,
    struct.error,
    ValueError,
    NotImplementedError,
)


@dataclass(frozen=True)
class ArchiveLimits:
    """How much an archive may unpack to.

    Text compresses to a fifth or a tenth of its size; a hundredth is a bomb, unless the result is small.

    Attributes:
        ratio: The most unpacked bytes per packed byte.
        free_bytes: Unpacked bytes up to which the ratio does not matter.
        max_bytes: The most unpacked bytes of any archive.
        max_members: The most members of any archive.
    """

    ratio: float = 100.0
    free_bytes: int = 64 * 2**20
    max_bytes: int = 2**41
    max_members: int = 2_000_000

    def unpacked_limit(self, packed_bytes: int) -> int:
        """Return how many bytes an archive of this size may unpack to."""
        return min(self.max_bytes, max(self.free_bytes, int(packed_bytes * self.ratio)))


class _RejectedArchiveError(Exception):
    """Why an archive is not unpacked."""


def is_archive(path: Path) -> bool:
    """Return whether `extract` can unpack a file, judging by its first bytes."""
    return _kind(path) is not None


def extract(archive: Path, target: Path, limits: ArchiveLimits = ArchiveLimits()) -> Path:
    """Unpack an archive into a new folder, completely or not at all.

    Args:
        archive: The archive.
        target: The folder to create; it must not exist.
        limits: How much the archive may unpack to.

    Returns:
        The folder.

    Raises:
        DataError: The file is not an archive, is damaged, or is rejected as unsafe.
    """
    kind = _kind(archive)
    if kind is None:
        raise DataError(f"{archive} is not an archive; give a zip or tar file (also .gz, .bz2, .xz, .zst)")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        budget = _UnpackBudget(limits, archive.stat().st_size)
        (_unzip if kind == "zip" else _untar)(archive, staging, budget)
        staging.replace(target)
    except _RejectedArchiveError as rejection:
        raise DataError(f"{archive.name} is rejected: {rejection}; nothing of it was kept") from None
    except _DAMAGE_ERRORS as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # a problem of the disk; EINVAL is one of the archive: a position before its start
        raise DataError(
            f"{archive.name} is damaged: {error or type(error).__name__}; nothing of it was kept"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def safe_path(folder: Path, name: str) -> Path:
    """Return the path inside `folder` for a file name from an untrusted source.

    Raises:
        DataError: The name leads out of the folder, or is not valid.
    """
    try:
        return folder.joinpath(*_parts(name))
    except _RejectedArchiveError as rejection:
        raise DataError(str(rejection)) from None


class _UnpackBudget:
    """Counts what is unpacked, and rejects the archive once it is too much."""

    def __init__(self, limits: ArchiveLimits, packed_bytes: int) -> None:
        self._limits, self._packed_bytes = limits, packed_bytes
        self._written = self._members = 0
        self._seen: set[str] = set()

    def add_member(self, name: str) -> tuple[str, ...]:
        """Count a member and return the parts of its path; an empty path is the folder itself."""
        parts = _parts(name)
        self._members += 1
        if self._members > self._limits.max_members:
            raise _RejectedArchiveError(f"it has more than {self._limits.max_members} members")
        return parts

    def check_unique(self, name: str) -> None:
        """Reject a second file of the same name; case does not distinguish names, as on some disks."""
        if name.casefold() in self._seen:
            raise _RejectedArchiveError(f"{name!r} is in it twice")
        self._seen.add(name.casefold())

    def copy(self, source: IO[bytes], target: Path) -> None:
        """Write a member's bytes, as many as there are, whatever its header claims."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as opened:
            while block := source.read(file_io.BLOCK_BYTES):
                self._count(len(block))
                opened.write(block)

    def _count(self, size: int) -> None:
        self._written += size
        limit = self._limits.unpacked_limit(self._packed_bytes)
        if self._written > limit:
            raise _RejectedArchiveError(
                f"it unpacks to more than {limit / 1e6:.0f} MB, from {self._packed_bytes / 1e6:.1f} MB"
            )


def _unzip(archive: Path, folder: Path, budget: _UnpackBudget) -> None:
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            parts = budget.add_member(member.filename)
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _RejectedArchiveError(
                    f"{member.filename!r} is {'a link' if kind == stat.S_IFLNK else 'not a regular file'}"
                )
            if member.flag_bits & 1:
                raise _RejectedArchiveError(f"{member.filename!r} is encrypted")
            if member.is_dir():
                folder.joinpath(*parts).mkdir(parents=True, exist_ok=True)
                continue
            budget.check_unique("/".join(parts))
            with opened.open(member) as source:
                budget.copy(source, folder.joinpath(*parts))


def _untar(archive: Path, folder: Path, budget: _UnpackBudget) -> None:
    with _decompressed(archive) as stream:
        guarded = _HeaderGuard(stream)
        with tarfile.open(fileobj=guarded, mode="r|") as opened:
            while (member := opened.next()) is not None:
                opened.members = []  # type: ignore[attr-defined]  # tarfile would store every member
                parts = budget.add_member(member.name)
                if member.isdir():
                    folder.joinpath(*parts).mkdir(parents=True, exist_ok=True)
                    continue
                if not member.isreg() or member.issparse():
                    is_link = member.issym() or member.islnk()
                    raise _RejectedArchiveError(
                        f"{member.name!r} is {'a link' if is_link else 'not a regular file'}"
                    )
                budget.check_unique("/".join(parts))
                source = opened.extractfile(member)
                assert source is not None
                guarded.is_header = False
                budget.copy(source, folder.joinpath(*parts))
                guarded.is_header = True


class _HeaderGuard(io.RawIOBase):
    """A decompressed tar that limits how much tarfile may read for one header."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._header_bytes = 0
        self.is_header = True

    def read(self, size: int = -1) -> bytes:
        self._header_bytes = self._header_bytes + size if self.is_header else 0
        if self._header_bytes > _MAX_HEADER_BYTES:
            raise _RejectedArchiveError("a header in it is far too long")
        return self._stream.read(size)


def _decompressed(archive: Path) -> io.BufferedReader:
    with archive.open("rb") as opened:
        head = opened.read(8)
    compression = next((suffix for magic, suffix in _MAGICS.items() if head.startswith(magic)), None)
    return file_io.open_decompressed(FileRange(archive, archive.name).open_raw(), compression, archive.name)


def _kind(path: Path) -> str | None:
    try:
        with FileRange(path, path.name).open_raw() as opened:
            if opened.read(4) in _ZIP_MAGICS:
                return "zip"
        with _decompressed(path) as stream:
            head = stream.read(512)
    except file_io.READ_ERRORS:
        return None
    offset, magic = _TAR_MAGIC
    return "tar" if head[offset : offset + len(magic)] == magic else None


def _parts(name: str) -> tuple[str, ...]:
    """The parts of a member's name; rejects a name that leads out of the folder or is not valid."""
    if "\\" in name or any(ord(character) < 32 for character in name) or name[1:2] == ":":
        raise _RejectedArchiveError(f"{name!r} is not a valid file name")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise _RejectedArchiveError(f"{name!r} leads out of the folder")
    if any(len(part.encode("utf-8", "surrogatepass")) > 255 for part in path.parts) or len(path.parts) > 32:
        raise _RejectedArchiveError(f"the name {name[:80]!r}… is too long")
    return path.parts
