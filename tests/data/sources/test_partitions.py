"""The partitions of a source, which any number of workers can read in parallel."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_trainer.data.sources import file_io
from llm_trainer.data.sources.base import Partition, Rejected, Source, SourceItem, SplitPartition, TextChunk
from llm_trainer.data.sources.builtin_corpus import BuiltinSource
from llm_trainer.data.sources.file_source import FileSource
from llm_trainer.data.sources.hub_source import HubSource

TEXTS = [f"document {number} " + "word " * (number % 7) for number in range(60)]


def summaries(items: Sequence[SourceItem]) -> list[str]:
    """Texts and reasons, without positions, which are counted from the start of a partition."""
    return [item.text if isinstance(item, TextChunk) else f"({item.reason})" for item in items]


def read_pickled(partitions: Sequence[Partition]) -> list[SourceItem]:
    """What workers read that receive the partitions pickled."""
    return [item for partition in partitions for item in pickle.loads(pickle.dumps(partition)).read_chunks()]


def write_all_kinds(folder: Path) -> None:
    (folder / "lines.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    (folder / "records.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8"
    )
    (folder / "list.json").write_text(json.dumps([{"text": text} for text in TEXTS]), encoding="utf-8")
    (folder / "page.md").write_text("# Head\n\ntext", encoding="utf-8")
    table = pa.table({"text": TEXTS})
    pq.write_table(table, folder / "table.parquet", row_group_size=7)
    with pa.ipc.new_file(folder / "table.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=9)
    with pa.ipc.new_stream(folder / "stream.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=9)


@pytest.mark.parametrize("partition_bytes", [1, 100, 512, 5000, 2**20])
def test_partitions_of_any_size_add_up_to_the_source(tmp_path: Path, partition_bytes: int) -> None:
    write_all_kinds(tmp_path)
    undivided = FileSource(tmp_path, one_document_per_line=True, partition_bytes=2**30)
    parts = FileSource(tmp_path, one_document_per_line=True, partition_bytes=partition_bytes)
    assert len(undivided.partitions()) == 1
    assert summaries(read_pickled(parts.partitions())) == summaries(list(undivided.read_chunks()))
    assert len(undivided.partitions()[0].content_hash()) == 64
    assert len({partition.name for partition in parts.partitions()}) == len(parts.partitions())


@pytest.mark.parametrize(
    "name", ["lines.txt", "records.jsonl", "table.parquet", "table.arrow", "stream.arrow"]
)
def test_one_large_file_is_divided_into_several_partitions(tmp_path: Path, name: str) -> None:
    write_all_kinds(tmp_path)
    source = FileSource(
        tmp_path / name, one_document_per_line=True, partition_bytes=(tmp_path / name).stat().st_size // 4
    )
    partitions = source.partitions()
    assert 3 <= len(partitions) <= 6
    counts = [len(list(partition.read_chunks())) for partition in partitions]
    assert sum(counts) == len(TEXTS)
    assert max(counts) < len(TEXTS) / 2
    assert sum(partition.size for partition in partitions) == pytest.approx(
        (tmp_path / name).stat().st_size, rel=0.01
    )


@settings(max_examples=150)
@given(
    raw=st.lists(
        st.sampled_from([b"a", b"\n", b"\r", b"\xff", b"\xef\xbb\xbf", b"\0", b" "]), max_size=30
    ).map(b"".join),
    size=st.integers(1, 12),
)
def test_a_line_belongs_to_exactly_one_range(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, size: int
) -> None:
    file = tmp_path_factory.mktemp("ranges") / "a.txt"
    file.write_bytes(raw)
    undivided = FileSource(file, one_document_per_line=True, partition_bytes=2**20)
    parts = FileSource(file, one_document_per_line=True, partition_bytes=size)
    assert summaries(list(parts.read_chunks())) == summaries(list(undivided.read_chunks()))


def test_a_line_over_many_ranges_is_scanned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"short\n" + b"x" * 100_000 + b"\nend\n")
    monkeypatch.setattr(file_io, "MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr(file_io, "BLOCK_BYTES", 100)
    partitions = FileSource(file, one_document_per_line=True, partition_bytes=10_000).partitions()
    assert len(partitions) == 11
    assert [summaries(list(partition.read_chunks())) for partition in partitions] == [
        ["short", "(line longer than 0 MB)"],
        *[[]] * 9,
        ["end"],
    ]
    first = partitions[1]
    with file.open("rb") as opened:
        begin, end = file_io.line_range(opened, file_io.FileRange(file, "a.txt", 10_000, 20_000))
        assert begin == end
        assert opened.tell() <= 20_100, "a range in which no line begins is not read past its end"
    assert first.content_hash() == partitions[2].content_hash(), "ranges without a line have no documents"


def test_small_files_form_one_partition_up_to_its_size(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text("x" * 100, encoding="utf-8")
    partitions = FileSource(tmp_path, partition_bytes=350).partitions()
    assert [partition.name for partition in partitions] == [
        "0.txt and 2 more",
        "3.txt and 2 more",
        "6.txt and 2 more",
        "9.txt",
    ]
    assert [partition.size for partition in partitions] == [300, 300, 300, 100]


@pytest.mark.parametrize("partition_bytes", [200, 2**20])
def test_a_hash_depends_on_contents_and_ways_of_reading_but_not_on_paths_and_dates(
    tmp_path: Path, partition_bytes: int
) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        write_all_kinds(tmp_path / folder)
    here = FileSource(tmp_path / "here", partition_bytes=partition_bytes)
    there = FileSource(tmp_path / "there", partition_bytes=partition_bytes)
    (tmp_path / "there" / "page.md").touch()
    assert [partition.content_hash() for partition in here.partitions()] == [
        partition.content_hash() for partition in there.partitions()
    ]
    assert all(str(tmp_path) not in partition.name for partition in here.partitions())
    other = FileSource(tmp_path / "there", text_column="body", partition_bytes=partition_bytes)
    assert here.content_hash() != other.content_hash()
    before = [partition.content_hash() for partition in there.partitions()]
    with (tmp_path / "there" / "records.jsonl").open("a", encoding="utf-8") as opened:
        opened.write('"one more"\n')
    after = [
        partition.content_hash()
        for partition in FileSource(tmp_path / "there", partition_bytes=partition_bytes).partitions()
    ]
    assert before != after
    assert (
        sum(a == b for a, b in zip(before, after, strict=False)) == len(before) - 1
        if partition_bytes == 200
        else True
    )


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_partition_of_a_table_has_the_hash_of_its_own_rows(tmp_path: Path, kind: str) -> None:
    hashes = []
    for changed in (None, 3, 55):
        texts = [text if row != changed else text.upper() for row, text in enumerate(TEXTS)]
        file = tmp_path / f"{changed}.{kind}"
        table = pa.table({"text": texts, "other": list(range(len(texts)))})
        if kind == "parquet":
            pq.write_table(table, file, row_group_size=10)
        else:
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table, max_chunksize=10)
        hashes.append(
            [
                partition.content_hash()
                for partition in FileSource(file, partition_bytes=file.stat().st_size // 5).partitions()
            ]
        )
    same, early, late = hashes
    assert early[0] != same[0]
    assert early[1:] == same[1:]
    assert late[:-1] == same[:-1]
    assert late[-1] != same[-1]


def check_partitions(source: Source) -> list[SourceItem]:
    """Check that partitions are picklable, have unique names, and add up to the source; return its items."""
    partitions = source.partitions()
    assert len({partition.name for partition in partitions}) == len(partitions) > 0
    items = read_pickled(partitions)
    assert items == list(source.read_chunks())
    assert [partition.content_hash() for partition in partitions] == [
        pickle.loads(pickle.dumps(partition)).content_hash() for partition in source.partitions()
    ]
    return items


def test_the_builtin_corpus_has_several_partitions() -> None:
    source = BuiltinSource()
    partitions = source.partitions()
    assert len(partitions) > 3
    assert sum(partition.size for partition in partitions) == source.size()
    assert (
        summaries(read_pickled(partitions[:1]))[0].startswith("Assignment expressions")
        or len(summaries(read_pickled(partitions[:1]))) > 50
    )


def hub_folder(folder: Path) -> str:
    """A local folder as `datasets` reads it: two files for training, one for validation."""
    folder.mkdir()
    for number in range(2):
        pq.write_table(
            pa.table({"text": TEXTS[30 * number : 30 * number + 30]}),
            folder / f"train-{number:05d}-of-00002.parquet",
        )
    pq.write_table(pa.table({"text": ["held out", None, ""]}), folder / "validation-00000-of-00001.parquet")
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset_has_partitions_downloaded_or_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    monkeypatch.setattr("llm_trainer.data.sources.hub_source._PARTITION_BYTES", 300)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    source = HubSource(
        hub_folder(tmp_path / "corpus"), None, "train", "validation", "text", streaming=streaming
    )
    items = check_partitions(source)
    assert [r.text for r in items if isinstance(r, TextChunk)] == [*TEXTS, "held out"]
    assert {r.split for r in items if isinstance(r, TextChunk)} == {"train", "validation"}
    assert [r.reason for r in items if isinstance(r, Rejected)] == [
        "no text in the column 'text'",
        "empty",
    ]
    assert all(str(tmp_path) not in r.where for r in items if isinstance(r, Rejected))
    assert len(source.partitions()) == (3 if streaming else 7)


def test_the_same_partition_of_another_split_has_another_hash_and_name() -> None:
    partition = BuiltinSource().partitions()[0]
    training, validation = SplitPartition(partition, "train"), SplitPartition(partition, "validation")
    assert training.content_hash() != validation.content_hash()
    assert training.name != validation.name
