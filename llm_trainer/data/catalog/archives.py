"""Opening archives that a stranger made: nothing lands outside the folder, nothing but plain files, and not
more than fits.

zip and tar (plain, or packed with gzip, bzip2, xz or zstd) are told apart by their first bytes. An archive is
refused as a whole, by name and member, for `..`, absolute names, links, devices and pipes, names twice,
encryption, and for unpacking to far more than it holds (a "bomb"): what counts is what is written, not what
headers say. Files get this user's default permissions.
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

from llm_trainer.data.sources import file_io as storage
from llm_trainer.data.sources.file_io import FileRange
from llm_trainer.errors import DataError

_MAGICS = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
_TAR_MAGIC = (257, b"ustar")
_ZIP_MAGICS = (b"PK\x03\x04", b"PK\x05\x06")
_LONGEST_HEADER = 2**20  # bytes of a tar's extended header; tarfile would hold whatever a header claims


_DAMAGE = (
    *storage.READ_ERRORS,
    zipfile.BadZipFile,
    tarfile.TarError,
    struct.error,
    ValueError,
    NotImplementedError,
)


@dataclass(frozen=True)
class ArchiveLimits:
    """What is still taken for an honest archive. Text packs to a fifth or a tenth; a hundredth is a bomb, if
    it is large at all.
    """

    ratio: float = 100.0
    free_bytes: int = 64 * 2**20  # up to here no ratio counts
    most_bytes: int = 2**41
    most_members: int = 2_000_000

    def allowance(self, packed: int) -> int:
        """How many bytes an archive of this size may unpack to."""
        return min(self.most_bytes, max(self.free_bytes, int(packed * self.ratio)))


class _Refused(Exception):
    """Why an archive is not opened."""


def is_archive(path: Path) -> bool:
    """Whether a file is one that `extract` opens, by its contents."""
    return _kind(path) is not None


def extract(archive: Path, target: Path, limits: Limits = ArchiveLimits()) -> Path:
    """Unpack into the new folder `target`, whole or not at all. Raises DataError for an archive that is
    damaged or refused.
    """
    kind = _kind(archive)
    if kind is None:
        raise DataError(f"{archive} is no archive: zip and tar (also .gz, .bz2, .xz, .zst) are opened")
    target.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        allowance = _Allowance(limits, archive.stat().st_size)
        (_unzip if kind == "zip" else _untar)(archive, workplace, allowance)
        workplace.replace(target)
    except _Refused as refused:
        raise DataError(f"{archive.name} is refused: {refused}; nothing of it was kept") from None
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # the disk, not the archive (of which EINVAL tells that it names a place before its beginning)
        raise DataError(
            f"{archive.name} is damaged: {error or type(error).__name__}; nothing of it was kept"
        ) from None
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
    return target


def safe_path(folder: Path, name: str) -> Path:
    """Where a file of this name, which a stranger chose, belongs inside `folder`. Raises DataError for one
    that leads elsewhere.
    """
    try:
        return folder.joinpath(*_parts(name))
    except _Refused as refused:
        raise DataError(str(refused)) from None


class _Allowance:
    """Counts what is unpacked, and refuses what is too much."""

    def __init__(self, limits: ArchiveLimits, packed: int) -> None:
        self._limits, self._packed = limits, packed
        self._written = self._members = 0
        self._seen: set[str] = set()

    def member(self, name: str) -> tuple[str, ...]:
        """The parts of a member's path; an empty one is the folder itself."""
        parts = _parts(name)
        self._members += 1
        if self._members > self._limits.most_members:
            raise _Refused(f"it has more than {self._limits.most_members} members")
        return parts

    def once(self, name: str) -> None:
        """A file may come once; upper and lower case are one, as they are on some disks."""
        if name.casefold() in self._seen:
            raise _Refused(f"{name!r} is in it twice")
        self._seen.add(name.casefold())

    def copy(self, source: IO[bytes], place: Path) -> None:
        """Write a member's bytes, as many as there are, whatever its header said."""
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("xb") as opened:
            while block := source.read(storage.BLOCK_BYTES):
                self.count(len(block))
                opened.write(block)

    def count(self, size: int) -> None:
        """So many bytes more have been unpacked."""
        self._written += size
        if self._written > self._limits.allowance(self._packed):
            raise _Refused(
                f"it unpacks to more than {self._limits.allowance(self._packed) / 1e6:.0f} MB, from {self._packed / 1e6:.1f} MB"
            )


def _unzip(archive: Path, folder: Path, allowance: _Allowance) -> None:
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            parts = allowance.member(member.filename)
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _Refused(
                    f"{member.filename!r} is {'a link' if kind == stat.S_IFLNK else 'no plain file'}"
                )
            if member.flag_bits & 1:
                raise _Refused(f"{member.filename!r} is encrypted")
            if member.is_dir():
                folder.joinpath(*parts).mkdir(parents=True, exist_ok=True)
                continue
            allowance.once("/".join(parts))
            with opened.open(member) as source:
                allowance.copy(source, folder.joinpath(*parts))


def _untar(archive: Path, folder: Path, allowance: _Allowance) -> None:
    with _unpacked(archive) as stream:
        guarded = _Guarded(stream)
        with tarfile.open(fileobj=guarded, mode="r|") as opened:
            while (member := opened.next()) is not None:
                opened.members = []  # type: ignore[attr-defined]  # tarfile keeps every member that it has seen
                parts = allowance.member(member.name)
                if member.isdir():
                    folder.joinpath(*parts).mkdir(parents=True, exist_ok=True)
                    continue
                if not member.isreg() or member.issparse():
                    raise _Refused(
                        f"{member.name!r} is {'a link' if member.issym() or member.islnk() else 'no plain file'}"
                    )
                allowance.once("/".join(parts))
                source = opened.extractfile(member)
                assert source is not None
                guarded.is_header = False
                allowance.copy(source, folder.joinpath(*parts))
                guarded.is_header = True


class _Guarded(io.RawIOBase):
    """An unpacked tar. While headers are read, only so much is given: tarfile would hold an extended header
    of any length.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._header = 0
        self.is_header = True

    def read(self, size: int = -1) -> bytes:
        self._header = self._header + size if self.is_header else 0
        if self._header > _LONGEST_HEADER:
            raise _Refused("a header in it is far too long")
        return self._stream.read(size)


def _unpacked(archive: Path) -> io.BufferedReader:
    with archive.open("rb") as opened:
        head = opened.read(8)
    compression = next((suffix for magic, suffix in _MAGICS.items() if head.startswith(magic)), None)
    return storage.open_decompressed(FileRange(archive, archive.name).open_raw(), compression, archive.name)


def _kind(path: Path) -> str | None:
    try:
        with FileRange(path, path.name).open_raw() as opened:
            if opened.read(4) in _ZIP_MAGICS:
                return "zip"
        with _unpacked(path) as stream:
            head = stream.read(512)
    except storage.READ_ERRORS:
        return None
    offset, magic = _TAR_MAGIC
    return "tar" if head[offset : offset + len(magic)] == magic else None


def _parts(name: str) -> tuple[str, ...]:
    """The parts of a member's name. Raises _Refused for one that leads out of the folder or that no honest
    archive has.
    """
    if "\\" in name or any(ord(character) < 32 for character in name) or name[1:2] == ":":
        raise _Refused(f"{name!r} is no name for a file")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise _Refused(f"{name!r} leads out of the folder")
    if any(len(part.encode("utf-8", "surrogatepass")) > 255 for part in path.parts) or len(path.parts) > 32:
        raise _Refused(f"{name[:80]!r}… is too long a name")
    return path.parts
