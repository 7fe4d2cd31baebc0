"""Each format of file is read, and what is broken in a file costs no more than itself."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from backports import zstd
from hypothesis import example, given, settings
from hypothesis import strategies as st
from source_texts import read

from llm_trainer.data.sources import file_io
from llm_trainer.data.sources.base import Record, Rejected, TextChunk
from llm_trainer.data.sources.file_source import FileSource
from llm_trainer.data.sources.record_reader import read_local_records
from llm_trainer.errors import DataError

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": zstd.compress,
}


def read_bytes(folder: Path, name: str, raw: bytes, **options: object) -> tuple[list[str], list[str]]:
    """Texts, and the reason of each rejected document, of a file with these contents."""
    (folder / name).write_bytes(raw)
    texts, rejected = read(folder / name, **options)
    return texts, [f"{r.reason} @ {r.where}" for r in rejected]


@pytest.mark.parametrize("compression", COMPRESSORS)
@pytest.mark.parametrize(
    ("name", "raw", "texts"),
    [
        ("a.txt", b"one\ntwo\n", ["one\ntwo\n"]),
        ("a.md", b"# one", ["# one"]),
        ("a.jsonl", b'{"text": "one"}\n"two"\n', ["one", "two"]),
        ("a.json", b'["one", {"text": "two"}]', ["one", "two"]),
        ("a.csv", b'id,text\n1,one\n2,"two, ""three""\nfour"\n', ["one", 'two, "three"\nfour']),
        ("a.tsv", b"text\tid\none, two\t1\n", ["one, two"]),
    ],
)
def test_every_text_format_is_read_plain_and_compressed(
    tmp_path: Path, name: str, raw: bytes, texts: list[str], compression: str
) -> None:
    assert read_bytes(tmp_path, name + compression, COMPRESSORS[compression](raw)) == (texts, [])
    twice = COMPRESSORS[compression](raw) + COMPRESSORS[compression](
        b"\n"
    )  # one file may have several compressed streams
    assert read_bytes(tmp_path, "b-" + name + compression, twice)[1] == []


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".zst"])
def test_a_truncated_or_invalid_compressed_file_is_rejected_as_unreadable(
    tmp_path: Path, compression: str
) -> None:
    raw = "\n".join(f"line {random.Random(number).random()}" for number in range(20_000)).encode()
    packed = COMPRESSORS[compression](raw)
    texts, rejected = read_bytes(
        tmp_path, f"a.txt{compression}", packed[: len(packed) // 2], one_document_per_line=True
    )
    assert rejected[-1].startswith("unreadable file @ a.txt")
    assert texts == raw.decode().split("\n")[: len(texts)], "what came before the damage is kept"
    assert read_bytes(tmp_path, f"b.txt{compression}", packed[: len(packed) // 2])[0] == [], (
        "half a document is not a document"
    )
    assert read_bytes(tmp_path, f"c.txt{compression}", b"no such thing")[1][0].startswith("unreadable file")


def test_tables_are_read_by_their_column(tmp_path: Path) -> None:
    kinds = [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.dictionary(pa.int32(), pa.string()),
    ]
    for number, kind in enumerate(kinds):
        values = pa.array(["one", None, "", "zwei ä"])
        column = values.dictionary_encode() if pa.types.is_dictionary(kind) else values.cast(kind)
        table = pa.table({"text": column, "id": [1, 2, 3, 4]})
        if kind != pa.string_view():
            pq.write_table(table, tmp_path / f"{number}.parquet")
            feather.write_feather(table, tmp_path / f"{number}.feather", compression="lz4")
        with pa.ipc.new_stream(tmp_path / f"{number}.arrow", table.schema) as writer:
            writer.write_table(table)
    texts, rejected = read(tmp_path)
    assert texts == ["one", "zwei ä"] * 13
    assert [r.reason for r in rejected] == ["no text in the column 'text'", "empty"] * 13
    assert rejected[0].where == "0.arrow, batch 0, row 1"
    texts, rejected = read(tmp_path / "0.parquet", text_column="id")
    assert (texts, len(rejected)) == ([], 4)
    texts, rejected = read(tmp_path / "0.parquet", text_column="body")
    assert rejected[0].where == "0.parquet: it has text, id"


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_row_of_a_table_that_is_not_utf8_costs_that_row(tmp_path: Path, kind: str) -> None:
    values = pa.array([b"one", b"\xff\xfe", b"three"]).view(pa.string())
    table = pa.table({"text": values})
    if kind == "parquet":
        pq.write_table(table, tmp_path / "a.parquet")
    else:
        with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
            writer.write_table(table)
    texts, rejected = read(tmp_path)
    assert texts == ["one", "three"]
    assert [r.reason for r in rejected] == ["not utf-8"]
    assert "row 1, byte 0" in rejected[0].where


def test_a_damaged_row_group_costs_that_row_group(tmp_path: Path) -> None:
    texts = [f"{random.Random(number).random()} " * 20 for number in range(300)]
    file = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": texts}), file, row_group_size=100, compression="zstd", write_page_checksum=True
    )
    facts = pq.ParquetFile(file).metadata.row_group(1).column(0)
    raw = bytearray(file.read_bytes())
    raw[(facts.dictionary_page_offset or facts.data_page_offset) + facts.total_compressed_size // 2] ^= 0xFF
    file.write_bytes(raw)
    kept, rejected = read(file)
    assert [r.reason for r in rejected] == ["unreadable rows"]
    assert rejected[0].where.startswith("a.parquet, rows 100 to 199")
    assert kept == texts[:100] + texts[200:]


@settings(max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream"])
def test_damaged_tables_never_stop_reading(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("garbled")
    table = pa.table({"text": [f"text {number}" for number in range(40)]})
    file = folder / f"a.{'parquet' if kind == 'parquet' else 'arrow'}"
    if kind == "parquet":
        pq.write_table(table, file, row_group_size=10, write_page_checksum=True)
    else:
        with (pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream)(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=10)
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    (folder / "b.txt").write_text("after it", encoding="utf-8")
    for partition_bytes in (2**20, 300):
        source = FileSource(folder, partition_bytes=partition_bytes)
        texts = [item.text for item in source.read_chunks() if isinstance(item, TextChunk)]
        assert texts[-1] == "after it"
        assert len(source.content_hash()) == 64


FIELD = st.lists(st.sampled_from([*'ab ,;"\n\t|ä', "\r\n"]), max_size=6).map("".join)


@settings(max_examples=200)
@given(
    rows=st.lists(st.tuples(FIELD, FIELD), max_size=8),
    delimiter=st.sampled_from(",;\t|"),
    end=st.sampled_from(["\n", "\r\n"]),
)
@example(rows=[("", "")], delimiter=",", end="\n")
def test_csv_reads_what_the_standard_library_wrote(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], delimiter: str, end: str
) -> None:
    file = tmp_path_factory.mktemp("csv") / "a.csv"
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened, delimiter=delimiter, lineterminator=end)
        writer.writerow(["id", "text"])
        writer.writerows(rows)
    texts, rejected = read(file)
    expected = [
        text
        for _, text in csv.reader(io.StringIO(file.read_bytes().decode(), newline=""), delimiter=delimiter)
    ]
    assert expected[1:] == [text for _, text in rows]
    assert texts == [text for text in expected[1:] if text and not text.isspace()]
    assert len(texts) + len(rejected) == len(rows)


def test_a_broken_record_of_csv_costs_its_first_line(tmp_path: Path) -> None:
    raw = b'text,id\n"fine",1\n"open\nnext,2\n"x"y,3\n\xff,4\nmore,5,6\nfew\n"two\n\nlines",7\n'
    texts, rejected = read_bytes(tmp_path, "a.csv", raw)
    assert texts == ["fine", "next", "two\n\nlines"]
    assert rejected == [
        "not CSV @ a.csv, line 3",
        "not CSV @ a.csv, line 5",
        "not utf-8 @ a.csv, line 6, byte 37",
        "not CSV @ a.csv, line 7: 3 fields, the header has 2",
        "not CSV @ a.csv, line 8: 1 fields, the header has 2",
    ]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"id,body\n1,x\n", "no text in the column 'text' @ a.csv: its first record is id, body"),
        (b"", "empty @ a.csv"),
        (b'"never closed\n', "no text in the column 'text' @ a.csv: its first record is not CSV"),
    ],
)
def test_csv_without_the_column_is_rejected_with_what_it_has(
    tmp_path: Path, raw: bytes, expected: str
) -> None:
    assert read_bytes(tmp_path, "a.csv", raw) == ([], [expected])


def test_csv_does_not_scan_the_rest_for_each_open_quote(tmp_path: Path) -> None:
    lines = 20_000
    texts, rejected = read_bytes(tmp_path, "a.csv", b"text\n" + b'"open' * 1 + b"\nplain" * lines)
    assert (len(texts), len(rejected)) == (lines, 1)
    texts, rejected = read_bytes(tmp_path, "b.csv", b"text\n" + b'"open\n' * lines)
    assert (len(texts), len(rejected)) == (0, lines)


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200)
@given(
    records=st.lists(
        st.fixed_dictionaries(
            {"text": st.text('ab"\\[]{},ä\n', min_size=1, max_size=12)}, optional={"more": JSON}
        ),
        max_size=6,
    ),
    block=st.integers(1, 9),
    indent=st.none() | st.integers(0, 2),
    plain=st.booleans(),
)
def test_a_long_list_of_json_is_read_element_by_element(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[dict[str, object]],
    block: int,
    indent: int | None,
    plain: bool,
) -> None:
    file = tmp_path_factory.mktemp("list") / "a.json"
    file.write_text(json.dumps(records, indent=indent, ensure_ascii=plain), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_io, "BLOCK_BYTES", block)
        patch.setattr("llm_trainer.data.sources.json_files._HEAD_BYTES", block)
        texts, rejected = read(file)
    if file.read_bytes()[
        :block
    ].strip():  # a head without the list's first character makes the file one value
        assert texts == [record["text"] for record in records if not str(record["text"]).isspace()]
        assert len(texts) + len(rejected) == len(records)


def test_one_bad_element_of_a_json_list_costs_itself(tmp_path: Path) -> None:
    raw = b'[{"text": "one"}, {"text": \xff}, {text: 2}, 3, ["x"], "two", {"text": "thr'
    texts, rejected = read_bytes(tmp_path, "a.json", raw)
    assert texts == ["one", "two"]
    assert rejected == [
        "not utf-8 @ a.json, record 1, byte 27",
        "not JSON @ a.json, record 2",
        "no text in the column 'text' @ a.json, record 3: it is a number",
        "no text in the column 'text' @ a.json, record 4: it is a list",
        "not JSON @ a.json, record 6",
    ]


def test_a_json_file_may_have_one_record_per_line(tmp_path: Path) -> None:
    assert read_bytes(tmp_path, "a.json", b'{"text": "one"}\n{"text": "two"}\n') == (["one", "two"], [])
    assert read_bytes(tmp_path, "b.json", b'{"text":\n"one"}\n') == (["one"], [])
    assert read_bytes(tmp_path, "c.json", b'{"text": "one"}\n') == (["one"], [])


NAMES = [
    "a.txt",
    "a.md",
    "a.jsonl",
    "a.json",
    "a.csv",
    "a.txt.gz",
    "a.jsonl.zst",
    "a.csv.bz2",
    "a.parquet",
    "a.arrow",
]


@settings(max_examples=150)
@given(raw=st.binary(max_size=80), block=st.integers(1, 30), name=st.sampled_from(NAMES))
def test_no_bytes_stop_reading_of_later_files(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, block: int, name: str
) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / name).write_bytes(raw)
    (folder / "b.txt").write_text("after it", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_io, "BLOCK_BYTES", block)
        patch.setattr(file_io, "MAX_RECORD_BYTES", 40)
        texts, rejected = read(folder, one_document_per_line=True, partition_bytes=30)
    assert texts[-1] == "after it"
    assert all(rejection.where.startswith(name) for rejection in rejected)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_a_record_longer_than_the_limit_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(file_io, "MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr(file_io, "BLOCK_BYTES", 100)
    records = ["before", "x" * 5000, 'y"\\' * 3000, "after"]
    if name == "a.csv":
        raw = "text\n" + "\n".join(records)
    elif name == "a.txt":
        raw = "\n".join(records)
    else:
        parts = [json.dumps({"text": record}) for record in records]
        raw = "[" + ",".join(parts) + "]" if name == "a.json" else "\n".join(parts)
    texts, rejected = read_bytes(tmp_path, name, raw.encode(), one_document_per_line=True)
    assert texts == ["before", "after"]
    assert [expected.split(" longer")[0] for expected in rejected] == [
        "record" if name == "a.json" else "line"
    ] * 2


def test_a_pipe_or_dangling_link_is_rejected_without_blocking(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "here.txt").write_text("text", encoding="utf-8")
    texts, rejected = read(tmp_path)
    assert texts == ["text"]
    assert [r.reason for r in rejected] == ["unreadable file"] * 2
    assert len(FileSource(tmp_path).content_hash()) == 64


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="no limit on memory here")
@pytest.mark.parametrize(
    ("name", "head", "expected"),
    [
        ("a.jsonl", b'{"text": "one"}\n"', ["one", "line longer than 64 MB"]),
        ("a.json", b'[{"text": "one"}, "', ["one", "record longer than 64 MB"]),
        ("a.csv", b'text\none\n"', ["one", "line longer than 64 MB"]),
        ("a.txt.gz", b"one\n", ["one", "line longer than 64 MB"]),
        ("a.txt.zst", b"one\n", ["one", "line longer than 64 MB"]),
    ],
)
def test_a_gigabyte_in_one_record_is_rejected_in_little_memory(
    tmp_path: Path, name: str, head: bytes, expected: list[str]
) -> None:
    file = tmp_path / name
    if file.suffix in (".gz", ".zst"):
        with gzip.open(file, "wb", 1) if file.suffix == ".gz" else zstd.open(file, "wb") as packed:
            packed.write(head)
            for _ in range(1024):
                packed.write(b"\1" * 2**20)
    else:
        with file.open("wb") as opened:
            opened.write(head)
            opened.truncate(2**30)
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from llm_trainer.data.sources.file_source import FileSource\n"
        "list(FileSource(Path(sys.argv[2]), one_document_per_line=True).read_chunks())  # imports\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 500 * 2**20,) * 2)\n"
        "source = FileSource(Path(sys.argv[1]), one_document_per_line=True)\n"
        "for partition in source.partitions():\n"
        "    for r in partition.read_chunks(): print(getattr(r, 'reason', None) or r.text)\n"
        "source.content_hash()\n"
    )
    small = tmp_path / f"small{''.join(file.suffixes)}"
    small.write_bytes(COMPRESSORS.get(file.suffix, bytes)(head))
    done = subprocess.run(
        [sys.executable, "-c", program, str(file), str(small)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == expected


def test_records_are_read_from_every_format_with_their_damage_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'x,y\n1,"two, ""three"""\nfew\n' + b"1," + b"z" * 200_000 + b"\n")
    (tmp_path / "b.json").write_text('[{"x": 1}, "text", {"x": 2}]', encoding="utf-8")
    values = pa.array([b"one", b"\xff\xfe", b"three"]).view(pa.string())
    pq.write_table(pa.table({"x": values}), tmp_path / "c.parquet")
    found = list(read_local_records(tmp_path))
    fields = [item.fields for item in found if isinstance(item, Record)]
    assert fields[0] == {"x": "1", "y": 'two, "three"'}
    assert fields[1] == {"x": "1", "y": "z" * 200_000}, "longer than a field of the standard library's csv"
    assert fields[2:] == [{"x": 1}, {"x": 2}, {"x": "one"}, {"x": "three"}]
    assert [(item.reason, item.where) for item in found if isinstance(item, Rejected)] == [
        ("not CSV", "a.csv, line 3: 1 fields, the header has 2"),
        ("not a record", "b.json, record 1"),
        ("unreadable rows", "c.parquet, row 1"),
    ]


def test_a_missing_pyarrow_is_reported_alike_for_columns_and_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.table({"text": ["one"]}), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    messages = set()
    for items in (FileSource(tmp_path).read_chunks(), read_local_records(tmp_path)):
        with pytest.raises(DataError) as raised:
            list(items)
        messages.add(str(raised.value))
    assert len(messages) == 1
    assert "reading a.parquet needs the extra 'formats'" in messages.pop()
