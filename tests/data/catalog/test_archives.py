"""Archives from untrusted sources: a harmless one is unpacked, any other leaves nothing behind."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_trainer.data.catalog.archives import ArchiveLimits, extract, is_archive, safe_path
from llm_trainer.errors import DataError

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "tar": bytes,
    "tar.gz": lambda raw: gzip.compress(raw, mtime=0),
    "tar.bz2": bz2.compress,
    "tar.xz": lzma.compress,
    "tar.zst": zstd.compress,
}
Member = tuple[str, bytes]


def zip_of(*members: Member, mode: int = 0o100644) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in members:
            facts = zipfile.ZipInfo(name)
            facts.external_attr = mode << 16
            facts.compress_type = zipfile.ZIP_DEFLATED
            opened.writestr(facts, content)
    return buffer.getvalue()


def tar_of(*members: Member, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as opened:
        for name, content in members:
            facts = tarfile.TarInfo(name)
            facts.type, facts.linkname, facts.size, facts.mode = kind, link, len(content), 0o4777
            opened.addfile(facts, io.BytesIO(content))
    return buffer.getvalue()


def left(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("kind", ["zip", *PACKERS])
def test_a_harmless_archive_is_unpacked(tmp_path: Path, kind: str) -> None:
    members = (("corpus/a.txt", b"one"), ("corpus/deep/./b.txt", b"two" * 1000), ("c.txt", b""))
    file = tmp_path / "x.bin"  # recognized by its contents, whatever its name
    file.write_bytes(zip_of(*members) if kind == "zip" else PACKERS[kind](tar_of(*members)))
    assert is_archive(file)
    folder = extract(file, tmp_path / "out")
    assert left(folder) == ["c.txt", "corpus", "corpus/a.txt", "corpus/deep", "corpus/deep/b.txt"]
    assert (folder / "corpus/deep/b.txt").read_bytes() == b"two" * 1000
    assert not (folder / "corpus/a.txt").stat().st_mode & 0o4111, "neither executable nor setuid"


BAD_NAMES = [
    "../x.txt",
    "a/../../x.txt",
    "/tmp/x.txt",
    "C:\\x.txt",
    "C:x.txt",
    "a\\..\\..\\x.txt",
    "a\nb.txt",
    "d/" * 40 + "x",
    "n" * 300,
]


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("name", BAD_NAMES)
def test_an_unsafe_or_invalid_name_rejects_the_archive(tmp_path: Path, kind: str, name: str) -> None:
    file = tmp_path / "inside" / f"x.{kind}"
    file.parent.mkdir()
    members = (("fine.txt", b"fine"), (name, b"bad"))
    file.write_bytes(zip_of(*members) if kind == "zip" else tar_of(*members))
    with pytest.raises(DataError, match=f"x.{kind} is rejected"):
        extract(file, tmp_path / "inside" / "out")
    assert left(tmp_path) == ["inside", f"inside/x.{kind}"]


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (tarfile.SYMTYPE, "a link"),
        (tarfile.LNKTYPE, "a link"),
        (tarfile.CHRTYPE, "not a regular"),
        (tarfile.BLKTYPE, "not a regular"),
        (tarfile.FIFOTYPE, "not a regular"),
    ],
)
def test_links_and_devices_reject_a_tar(tmp_path: Path, kind: bytes, word: str) -> None:
    file = tmp_path / "x.tar"
    file.write_bytes(tar_of(("odd", b""), kind=kind, link="/etc") + tar_of(("odd/x", b"bad")))
    with pytest.raises(DataError, match=f"'odd' is {word}"):
        extract(file, tmp_path / "out")
    assert left(tmp_path) == ["x.tar"]


@pytest.mark.parametrize(
    ("mode", "word"), [(0o120777, "a link"), (0o020666, "not a regular"), (0o010666, "not a regular")]
)
def test_links_and_devices_reject_a_zip(tmp_path: Path, mode: int, word: str) -> None:
    file = tmp_path / "x.zip"
    file.write_bytes(zip_of(("odd", b"/etc/passwd"), mode=mode))
    with pytest.raises(DataError, match=f"'odd' is {word}"):
        extract(file, tmp_path / "out")
    assert left(tmp_path) == ["x.zip"]


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.xz", "tar.zst"])
def test_a_bomb_is_rejected_by_what_it_unpacks_to(tmp_path: Path, kind: str) -> None:
    members = tuple((f"{number}.txt", b"\0" * 2**20) for number in range(8))
    file = tmp_path / "x"
    file.write_bytes(zip_of(*members) if kind == "zip" else PACKERS[kind](tar_of(*members)))
    limits = ArchiveLimits(ratio=50, free_bytes=2**20)
    with pytest.raises(DataError, match="unpacks to more than"):
        extract(file, tmp_path / "out", limits)
    assert left(tmp_path) == ["x"]
    assert left(extract(file, tmp_path / "out")) == sorted(name for name, _ in members), (
        "a small result is harmless"
    )


def test_a_zip_with_false_sizes_is_damaged_or_rejected(tmp_path: Path) -> None:
    raw = bytearray(zip_of(("a.txt", b"\0" * 2**21)))
    position = raw.rindex(b"PK\x01\x02")
    raw[position + 24 : position + 28] = (10).to_bytes(4, "little")
    (tmp_path / "x.zip").write_bytes(raw)
    with pytest.raises(DataError):
        extract(tmp_path / "x.zip", tmp_path / "out", ArchiveLimits(free_bytes=2**20))
    assert left(tmp_path) == ["x.zip"]


def test_a_tar_header_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    facts = tarfile.TarInfo("pax")
    facts.type, facts.size = tarfile.XHDTYPE, 2**30
    with gzip.open(tmp_path / "x.tar.gz", "wb") as packed:
        packed.write(facts.tobuf())
        packed.write(b"\0" * 2**23)
    with pytest.raises(DataError, match="header in it is far too long"):
        extract(tmp_path / "x.tar.gz", tmp_path / "out")


def test_duplicate_names_too_many_members_and_sparse_files_are_rejected(tmp_path: Path) -> None:
    file = tmp_path / "x.tar"
    file.write_bytes(tar_of(("a.txt", b"1"), ("A.txt", b"2")))
    with pytest.raises(DataError, match=r"'A\.txt' is in it twice"):
        extract(file, tmp_path / "out")
    file.write_bytes(tar_of(*((str(number), b"") for number in range(5))))
    with pytest.raises(DataError, match="more than 4 members"):
        extract(file, tmp_path / "out", ArchiveLimits(max_members=4))
    file.write_bytes(tar_of(("holes", b""), kind=tarfile.GNUTYPE_SPARSE))
    with pytest.raises(DataError, match="not a regular file"):
        extract(file, tmp_path / "out")


def test_an_encrypted_zip_is_rejected(tmp_path: Path) -> None:
    raw = bytearray(zip_of(("a.txt", b"secret")))
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(magic) + offset] |= 1
    (tmp_path / "x.zip").write_bytes(raw)
    with pytest.raises(DataError, match="encrypted"):
        extract(tmp_path / "x.zip", tmp_path / "out")


def test_a_file_that_is_not_an_archive_is_reported(tmp_path: Path) -> None:
    for name, raw in {
        "a.zip": b"text",
        "b.tar.gz": gzip.compress(b"text"),
        "c.tar": b"",
        "d.tar.gz": b"\x1f\x8bcut",
    }.items():
        (tmp_path / name).write_bytes(raw)
        assert not is_archive(tmp_path / name)
        with pytest.raises(DataError, match="is not an archive"):
            extract(tmp_path / name, tmp_path / "out")


def test_a_zip_whose_members_would_begin_before_it_is_reported_as_damaged(tmp_path: Path) -> None:
    raw = bytearray(zip_of(("a.txt", b"text" * 500)))
    directory = raw.rindex(b"PK\x05\x06") + 16  # the field of the end record with the directory's position
    raw[directory : directory + 4] = (int.from_bytes(raw[directory : directory + 4], "little") + 1).to_bytes(
        4, "little"
    )
    (tmp_path / "x.zip").write_bytes(raw)
    with pytest.raises(DataError, match="is damaged"):
        extract(tmp_path / "x.zip", tmp_path / "out")
    assert left(tmp_path) == ["x.zip"]


@settings(max_examples=150)
@given(kind=st.sampled_from(["zip", *PACKERS]), data=st.data())
def test_a_corrupted_archive_is_an_error_or_is_unpacked_inside_the_folder(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("garbled")
    members = (("a.txt", bytes(range(50))), ("b/c.txt", b"text" * 50))
    raw = bytearray(zip_of(*members) if kind == "zip" else PACKERS[kind](tar_of(*members)))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (folder / "x").write_bytes(
        raw[: data.draw(st.integers(1, len(raw)))] if data.draw(st.booleans()) else raw
    )
    try:
        extract(folder / "x", folder / "out")
    except DataError:
        assert left(folder) == ["x"]
    else:
        assert {path.split("/")[0] for path in left(folder)} == {"x", "out"}


def test_a_name_from_a_server_stays_inside_the_folder(tmp_path: Path) -> None:
    assert safe_path(tmp_path, "data/train-0.parquet") == tmp_path / "data" / "train-0.parquet"
    with pytest.raises(DataError, match="leads out"):
        safe_path(tmp_path, "../train-0.parquet")
