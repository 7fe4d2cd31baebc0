"""Every document of a file is kept or rejected with its reason."""

from __future__ import annotations

import bz2
import gzip
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_texts import read

from llm_trainer.data.sources import base, file_io
from llm_trainer.data.sources.base import Rejected, TextChunk
from llm_trainer.data.sources.builtin_corpus import BuiltinSource
from llm_trainer.data.sources.file_source import FileSource
from llm_trainer.errors import DataError


def test_a_folder_is_read_in_path_order_each_format_by_its_reader(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.md").write_text("# Head", encoding="utf-8")
    (tmp_path / "a.txt").write_text("line 1\nline 2\n", encoding="utf-8")
    (tmp_path / "c.jsonl").write_text('{"text": "first"}\n\n"second"\n', encoding="utf-8")
    (tmp_path / "d.json").write_text('[{"text": "third"}, {"text": "fourth"}]', encoding="utf-8")
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / ".hidden.txt").write_text("no", encoding="utf-8")
    (tmp_path / "f.text.bz2").write_bytes(bz2.compress(b"too"))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    texts, rejected = read(tmp_path)
    assert texts == ["line 1\nline 2\n", "# Head", "first", "second", "third", "fourth", "packed", "too"]
    assert rejected == []


def test_an_excluded_output_folder_inside_the_input_is_not_read(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "out"):
        folder.mkdir(exist_ok=True)
        (folder / "a.txt").write_text(folder.name, encoding="utf-8")
    assert read(tmp_path, excluded=tmp_path / "out")[0] == [tmp_path.name]


def test_lines_can_be_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n  \nthree \xff\nfour")
    texts, rejected = read(tmp_path / "a.txt", one_document_per_line=True)
    assert texts == ["one", "two", "four"]
    assert [(r.reason, r.where.split("a.txt, ")[1]) for r in rejected] == [
        ("empty", "line 3"),
        ("empty", "line 4"),
        ("not utf-8", "line 5, byte 22"),
    ]


def test_a_file_that_is_not_utf8_is_rejected_with_its_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("gut für".encode("latin-1"))
    (tmp_path / "b.txt").write_bytes("text".encode("utf-16"))
    _, rejected = read(tmp_path)
    assert [r.reason for r in rejected] == ["not utf-8", "not utf-8"]
    assert rejected[0].where.endswith("a.txt, byte 5")
    assert "utf-16" in rejected[1].where


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\t", "empty"),
        ("a.txt", b"a\0b", "contains NUL"),
        ("a.jsonl", b"{broken\n", "not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', "no text in the column 'text'"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "not JSON"),
        ("a.jsonl", b'"\\ud800"\n', "not utf-8"),
        ("a.json", b'{"text": 3}', "no text in the column 'text'"),
        ("a.json", b"\xff", "not utf-8"),
        ("a.txt.gz", b"not a gzip", "unreadable file"),
        ("a.txt.gz", gzip.compress(b"cut short" * 1000, mtime=0)[:-20], "unreadable file"),
    ],
)
def test_what_cannot_be_used_is_rejected_with_a_reason(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    texts, rejected = read(tmp_path / name)
    assert texts == []
    assert [r.reason for r in rejected] == [reason]
    assert name in rejected[0].where


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        (
            {"messages": [{"role": "user", "content": "Hi"}], "id": 3},
            "it has messages (a list), id (a number)",
        ),
        ({"instruction": "Add", "input": "", "output": "3"}, "it has instruction, input, output"),
        ({"text": None, "meta": {}}, "it has text (null), meta (an object)"),
        ({}, "it has no columns"),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_record_without_the_column_is_rejected_with_the_columns_that_it_has(
    tmp_path: Path, record: dict[str, object], columns: str, suffix: str
) -> None:
    (tmp_path / f"a.{suffix}").write_text(json.dumps(record) + "\n")
    _, rejected = read(tmp_path / f"a.{suffix}")
    assert [item.where.partition(": ")[2] for item in rejected] == [columns]


@settings(max_examples=100)
@given(
    lines=st.lists(st.binary(max_size=30).map(lambda raw: raw.replace(b"\n", b"")), min_size=1, max_size=20),
    block=st.integers(1, 40),
)
def test_every_line_is_kept_or_rejected(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], block: int
) -> None:
    file = tmp_path_factory.mktemp("lines") / "a.txt"
    file.write_bytes(b"".join(line + b"\n" for line in lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_io, "MAX_RECORD_BYTES", 20)
        patch.setattr(file_io, "BLOCK_BYTES", block)
        texts, rejected = read(file, one_document_per_line=True)
    assert len(texts) + len(rejected) == len(lines)


@settings(max_examples=100)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), min_size=1),
    block=st.integers(1, 9),
    limit=st.integers(1, 30),
)
def test_the_chunks_of_a_long_text_add_up_to_the_text(
    tmp_path_factory: pytest.TempPathFactory, text: str, block: int, limit: int
) -> None:
    file = tmp_path_factory.mktemp("long") / "a.txt"
    file.write_bytes(text.encode("utf-8"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "CHUNK_BYTES", limit)
        patch.setattr(file_io, "BLOCK_BYTES", block)
        texts, rejected = read(file)
    assert texts == ([] if text.isspace() else [text])
    assert len(texts) + len(rejected) == 1


@settings(max_examples=100)
@given(raw=st.binary(min_size=1, max_size=60), block=st.integers(1, 9))
def test_a_long_file_is_accepted_or_rejected_like_a_short_one(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, block: int
) -> None:
    file = tmp_path_factory.mktemp("long") / "a.txt"
    file.write_bytes(raw)
    short = read(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "CHUNK_BYTES", 2)
        patch.setattr(file_io, "BLOCK_BYTES", block)
        long = read(file)
    assert long[0] == short[0]
    assert [r.where for r in long[1]] == [r.where for r in short[1]] or {r.reason for r in long[1]} <= {
        "contains NUL",
        "not utf-8",
    }


def test_chunks_end_between_a_letter_and_a_space() -> None:
    text = "some words and, others 12 34 " * 400
    chunks = list(base.rechunk(iter([text])))
    assert len(chunks) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "CHUNK_BYTES", 1000)
        chunks = list(base.rechunk(iter([text])))
    assert "".join(chunk.text for chunk in chunks) == text
    assert len(chunks) > 5
    assert all(chunk.text[-1].isalpha() for chunk in chunks[:-1])
    assert all(chunk.text[0] == " " for chunk in chunks[1:])
    assert [chunk.is_last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="no limit on memory here")
def test_a_gigabyte_without_a_line_end_is_read_in_little_memory(tmp_path: Path) -> None:
    file = tmp_path / "sparse.txt"
    with file.open("wb") as opened:
        opened.write(b"a" * 5_000_000)
        opened.truncate(2**30)
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from llm_trainer.data.sources.file_source import FileSource\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20,) * 2)\n"
        "for lines in (True, False):\n"
        "    source = FileSource(Path(sys.argv[1]), one_document_per_line=lines)\n"
        "    print([r.reason for r in source.read_chunks()])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["['line longer than 64 MB']", "['contains NUL']"]


def test_a_missing_input_and_a_folder_without_text_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        FileSource(tmp_path / "nowhere").files()
    (tmp_path / "table.xlsx").write_bytes(b"")
    with pytest.raises(DataError, match=r"\.xlsx.*\.txt"):
        FileSource(tmp_path).files()


def test_a_file_given_directly_is_read_whatever_its_suffix(tmp_path: Path) -> None:
    (tmp_path / "corpus.data").write_text("text", encoding="utf-8")
    assert read(tmp_path / "corpus.data")[0] == ["text"]


def test_the_content_hash_ignores_paths_and_dates(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_text(json.dumps({"text": "same"}), encoding="utf-8")
    first, second = FileSource(tmp_path / "a"), FileSource(tmp_path / "b")
    assert first.content_hash() == second.content_hash()
    assert first.content_hash() != FileSource(tmp_path / "a", text_column="body").content_hash()
    (tmp_path / "b" / "x.jsonl").write_text(json.dumps({"text": "other"}), encoding="utf-8")
    assert first.content_hash() != second.content_hash()


def test_the_builtin_corpus_is_available_and_always_the_same() -> None:
    source = BuiltinSource()
    texts = [item.text for item in source.read_chunks() if isinstance(item, TextChunk)]
    size = sum(len(text.encode("utf-8")) for text in texts)
    assert len(texts) > 300
    assert 5e6 < size <= source.size()
    assert source.content_hash() == BuiltinSource().content_hash()
    assert any('The "assert" statement' in text for text in texts)
    assert not any(
        "lib2to3" in r.where or "/test/" in r.where for r in source.read_chunks() if isinstance(r, Rejected)
    )
