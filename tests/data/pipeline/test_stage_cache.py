"""What is recomputed and what is cached, the splits and states of documents, and the summary."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from llm_trainer.config import DataConfig
from llm_trainer.data.hashing import hash_fractions
from llm_trainer.data.pipeline import stage_cache as stages
from llm_trainer.data.pipeline.document_index import INDEX_FILE
from llm_trainer.data.pipeline.pipeline import prepare_dataset
from llm_trainer.data.pipeline.summary import PreparationSummary
from llm_trainer.data.prepared_dataset import open_prepared_dataset
from llm_trainer.data.sources.base import Partition, SourceItem, TextChunk
from llm_trainer.data.sources.file_source import FileSource
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.errors import DataError

LINES_A_FILE = 60
WORDS = (
    "the cat sat on a mat and saw many small birds fly over old houses"
    " while rain fell from grey clouds far away"
)


def sentence(number: int) -> str:
    """A line of text that differs from all others."""
    chosen = random.Random(number).choices(WORDS.split(), k=30)
    return f"{number} " + " ".join(chosen)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Four files of sixty documents, one partition each."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for file in range(4):
        lines = (sentence(LINES_A_FILE * file + line) for line in range(LINES_A_FILE))
        (folder / f"{file}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def source_of(texts: Path) -> FileSource:
    """Each file is a partition."""
    return FileSource(texts, one_document_per_line=True, partition_bytes=2000 * LINES_A_FILE // 10)


def prepared(texts: Path, output: Path, **options: object) -> PreparationSummary:
    return prepare_dataset(
        DataConfig(**{"vocab_size": 300, "val_ratio": 0.2, **options}), output, source=source_of(texts)
    )  # type: ignore[arg-type]


def texts_of(folder: Path, split: str) -> set[str]:
    data = open_prepared_dataset(folder)
    tokens: TokenDataset | None = getattr(data, split)
    assert tokens is not None
    assert data.tokenizer is not None
    starts = [*tokens.document_starts_in(0, len(tokens)).tolist(), len(tokens)]
    return {data.tokenizer.decode(tokens.read(a, b - a).tolist()) for a, b in itertools.pairwise(starts)}


def test_a_change_recomputes_what_depends_on_it_and_nothing_else(
    texts: Path, tmp_path: Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(**options: object) -> dict[str, int]:
        summary = prepared(texts, tmp_path / "out", **options)
        assert not summary.from_cache
        return {stage: count for stage, count in summary.num_computed.items() if count}

    def tokenizer_in(folder: Path) -> str:
        tiny_tokenizer.save(folder)
        return str(folder)

    everything = {"read": 4, "sample": 4, "tokenizer": 1, "encode": 4}
    assert made() == everything
    assert made(max_length=8) == {}
    assert made(packing_strategy="first_fit") == {}
    assert made(num_workers=3, deduplicate="exact") == {
        "deduplicate": 1
    }  # nothing is equal, so nothing after it changes
    assert made(min_length=2) == {"encode": 4}
    assert made(min_length=2, vocab_size=310) == {"tokenizer": 1, "encode": 4}
    assert made(min_length=2, tokenizer_path=tokenizer_in(tmp_path / "tokenizer")) == {
        "tokenizer": 1,
        "encode": 4,
    }
    assert made(tokenizer_type="char") == {
        "read": 4,
        "tokenizer": 1,
        "encode": 4,
    }  # reading collects the alphabet
    assert made() == everything
    assert made(seed=7) == {"sample": 4, "tokenizer": 1, "encode": 4}
    assert made(clean=True, seed=7) == everything
    monkeypatch.setitem(stages.VERSIONS, "encode", 99)
    assert made(clean=True, seed=7) == {"encode": 4}
    with (texts / "2.txt").open("a", encoding="utf-8") as file:
        file.write(sentence(1000) + "\n")
    tokenizer = tmp_path / "tokenizer"
    assert made(seed=7, tokenizer_path=str(tokenizer)) == {"read": 4, "tokenizer": 1, "encode": 4}
    (texts / "4.txt").write_text(sentence(1001) + "\n", encoding="utf-8")
    assert made(seed=7, tokenizer_path=str(tokenizer)) == {"read": 1, "encode": 1}
    (texts / "0.txt").unlink()
    assert made(seed=7, tokenizer_path=str(tokenizer)) == {}


def test_added_documents_do_not_change_the_splits_of_others(texts: Path, tmp_path: Path) -> None:
    options = {"test_ratio": 0.2, "deduplicate": "near"}
    prepared(texts, tmp_path / "before", **options)
    more = "\n".join(sentence(number) for number in range(5000, 5300))
    (texts / "00.txt").write_text(
        more + "\n" + sentence(3) + "\n", encoding="utf-8"
    )  # read first, with one that is there already
    summary = prepared(texts, tmp_path / "after", **options)
    assert summary.metadata.documents_rejected == {"exact duplicate": 1}
    for split in ("train", "validation", "test"):
        assert texts_of(tmp_path / "before", split) < texts_of(tmp_path / "after", split)


def test_near_duplicates_are_dropped_and_never_in_two_splits(texts: Path, tmp_path: Path) -> None:
    copies = [sentence(number) + " today" for number in range(LINES_A_FILE)]
    (texts / "9.txt").write_text("\n".join(copies), encoding="utf-8")
    straddling = prepared(texts, tmp_path / "kept").metadata
    assert (straddling.leaks, straddling.leak_check) == (0, "exact")
    summary = prepared(texts, tmp_path / "dropped", deduplicate="near")
    facts = summary.metadata
    assert (facts.leaks, facts.leak_check) == (0, "near")
    assert facts.documents_rejected["near duplicate"] > LINES_A_FILE // 2
    assert (
        facts.documents_in
        == 5 * LINES_A_FILE
        == facts.documents_kept + sum(facts.documents_rejected.values())
    )
    kept = set().union(*(texts_of(tmp_path / "dropped", split) for split in ("train", "validation")))
    assert {
        sentence(number) for number in range(LINES_A_FILE)
    } <= kept  # the first of each group is the one that is kept
    assert "leakage check: 0 held-out documents have a near-duplicate in another split" in summary.lines()


def test_leaks_between_splits_of_the_source_are_counted(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Given:
        name: str
        split: str
        texts: tuple[str, ...]
        size: int = 1

        def content_hash(self) -> str:
            return f"{self.split} {self.texts}"

        def read_chunks(self) -> Iterator[SourceItem]:
            return (TextChunk(text, True, self.split) for text in self.texts)

    @dataclass(frozen=True)
    class GivenSource:
        parts: tuple[Given, ...]
        name: str = "given"

        def partitions(self) -> list[Partition]:
            return [*self.parts]

        def read_chunks(self) -> Iterator[SourceItem]:
            return (piece for part in self.parts for piece in part.read_chunks())

        def content_hash(self) -> str:
            return str(self.parts)

        def size(self) -> None:
            return None

    train = tuple(sentence(number) for number in range(30))
    source = GivenSource((Given("a", "train", train), Given("b", "validation", (*train[:3], sentence(99)))))
    summary = prepare_dataset(DataConfig(vocab_size=300), tmp_path / "out", source=source)
    assert summary.metadata.leaks == 3
    assert summary.metadata.split_method == "from the source"
    assert set(summary.metadata.splits) == {"train", "validation"}
    assert texts_of(tmp_path / "out", "validation") == {*train[:3], sentence(99)}
    assert (
        prepare_dataset(
            DataConfig(vocab_size=300, deduplicate="exact"), tmp_path / "out", source=source
        ).metadata.leaks
        == 0
    )


def test_split_sizes_match_the_ratios_and_seeds_differ() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**63, (100_000, 2)).astype(np.uint64)
    drawn = hash_fractions(hashes, "one")
    assert np.histogram(drawn, 10, (0, 1))[0] == pytest.approx(10_000, rel=0.05)
    assert abs(np.corrcoef(drawn, hash_fractions(hashes, "two"))[0, 1]) < 0.02
    few = np.zeros((1000, 2), dtype=np.uint64)
    few[:, 1] = np.arange(1000)  # hashes that are alike are drawn apart all the same
    assert hash_fractions(few, "one").std() > 0.25


def test_rejected_documents_are_written_if_requested(texts: Path, tmp_path: Path) -> None:
    (texts / "5.txt").write_bytes(b"\n\xff\n" + sentence(3).encode() + b"\nshort\n")
    summary = prepared(texts, tmp_path / "out", keep_rejected=True, deduplicate="exact", min_length=10)
    with gzip.open(tmp_path / "out" / "rejected.jsonl.gz", "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    counted = Counter(record["reason"] for record in records)
    assert counted == summary.metadata.documents_rejected == {
        "empty": 1, "not utf-8": 1, "exact duplicate": 1, "shorter than min_length 10": 1,
    }  # fmt: skip
    assert {record["text"] for record in records} >= {sentence(3), "short"}
    assert not prepared(texts, tmp_path / "out").metadata.documents_rejected.keys() & {"exact duplicate"}
    assert not (tmp_path / "out" / "rejected.jsonl.gz").exists()


def test_the_stage_cache_can_be_removed(texts: Path, tmp_path: Path) -> None:
    prepared(texts, tmp_path / "out", cache_stages=False)
    assert not (tmp_path / "out" / ".stages").exists()
    assert prepared(texts, tmp_path / "out").from_cache


def test_results_that_are_no_longer_used_are_removed(texts: Path, tmp_path: Path) -> None:
    prepared(texts, tmp_path / "out")
    before = {path.name for path in (tmp_path / "out" / ".stages" / "encode").iterdir()}
    prepared(texts, tmp_path / "out", min_length=3)
    after = {path.name for path in (tmp_path / "out" / ".stages" / "encode").iterdir()}
    assert len(before) == len(after) == 4
    assert not before & after


def test_a_damaged_result_is_named(texts: Path, tmp_path: Path) -> None:
    prepared(texts, tmp_path / "out")
    table = sorted((tmp_path / "out" / ".stages" / "read").glob(f"*/{INDEX_FILE}"))[0]
    table.write_bytes(table.read_bytes()[:50])
    with pytest.raises(DataError, match=rf"{table.parent.name}.*damaged.*remove that folder"):
        prepared(texts, tmp_path / "out", min_length=3)


def test_the_summary_is_printed_and_written_as_json(texts: Path, tmp_path: Path) -> None:
    summary = prepared(texts, tmp_path / "out", max_length=16)
    told = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert told["documents_kept"] == 4 * LINES_A_FILE
    assert told["splits"]["train"]["tokens"] == summary.metadata.splits["train"].tokens
    assert told["stages"]["encode"]["made"] == 4
    assert [line for line in summary.lines() if "first_fit" in line and "padding" in line]
    picture = (tmp_path / "out" / "document_lengths.svg").read_text(encoding="utf-8")
    assert picture.startswith("<svg")
    assert "validation" in picture
