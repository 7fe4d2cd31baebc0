"""Preparing text: splits, tokenizer, shards, cache, and errors for bad input."""

from __future__ import annotations

import errno
import io
import itertools
import json
import shutil
import subprocess
import time
from pathlib import Path

import fork_server
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from llm_trainer.config import DataConfig
from llm_trainer.data.metadata import Metadata
from llm_trainer.data.pipeline import atomic_output as staging
from llm_trainer.data.pipeline import pipeline
from llm_trainer.data.pipeline import tokenize as encoding
from llm_trainer.data.pipeline.pipeline import prepare_dataset
from llm_trainer.data.pipeline.splits import SplitRatios, assign_chunks, plan_contiguous
from llm_trainer.data.prepared_dataset import check_vocabulary, open_prepared_dataset
from llm_trainer.data.sources import base as documents
from llm_trainer.data.sources.base import TextChunk
from llm_trainer.data.token_shards import ShardWriter, TokenDataset
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.errors import DataError, UsageError


@pytest.fixture
def texts(tmp_path: Path, tiny_texts: list[str]) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for index, text in enumerate(tiny_texts):
        (folder / f"{index:02d}.txt").write_text(text, encoding="utf-8")
    return folder


def whole(tokens: TokenDataset | None) -> list[int]:
    assert tokens is not None
    return tokens.read(0, len(tokens)).tolist()


def contents(folder: Path) -> dict[str, bytes]:
    """The prepared files, without the cached stages and the times in summary.json."""
    files = (
        path
        for path in folder.rglob("*")
        if path.is_file() and ".stages" not in path.relative_to(folder).parts
    )
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in files
        if path.name not in (".prepare.lock", "summary.json")
    }


def test_the_prepared_folder_contains_the_text_document_by_document(
    tiny_data: Path, tiny_texts: list[str]
) -> None:
    data = open_prepared_dataset(tiny_data)
    assert data.tokenizer is not None
    assert data.validation is not None
    starts = [*data.train.document_starts_in(0, len(data.train)).tolist(), len(data.train)]
    ids = whole(data.train)
    found = [ids[a:b] for a, b in itertools.pairwise(starts)]
    assert all(document[-1] == data.tokenizer.eos_id for document in found[:-1])
    assert [data.tokenizer.decode(document) for document in found[:-1]] == tiny_texts[: len(found) - 1]
    assert data.tokenizer.decode(ids + whole(data.validation)) == "".join(tiny_texts)
    assert data.train.num_bytes + data.validation.num_bytes == len("".join(tiny_texts).encode())  # type: ignore[operator]


def test_characters_are_split_and_numbered_as_in_nanogpt(tmp_path: Path, shakespeare_path: Path) -> None:
    prepare_dataset(DataConfig(input=str(shakespeare_path), tokenizer_type="char", val_ratio=0.1), tmp_path)
    data = open_prepared_dataset(tmp_path)
    text = shakespeare_path.read_text(encoding="utf-8")
    numbers = {character: i for i, character in enumerate(sorted(set(text)))}
    ids = [numbers[character] for character in text]
    assert whole(data.train) == ids[: int(len(ids) * 0.9)]
    assert whole(data.validation) == ids[int(len(ids) * 0.9) :]
    assert data.vocab_size == 65


def test_many_documents_are_split_by_their_own_hash(tmp_path: Path) -> None:
    def split(lines: list[str], place: str) -> dict[str, set[str]]:
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.txt").write_text("\n".join(lines), encoding="utf-8")
        config = DataConfig(
            input=str(tmp_path / place / "a.txt"),
            one_document_per_line=True,
            tokenizer_type="char",
            val_ratio=0.2,
            test_ratio=0.1,
        )
        summary = prepare_dataset(config, tmp_path / place / "out")
        assert "hash" in summary.metadata.split_method
        data = open_prepared_dataset(tmp_path / place / "out")
        found: dict[str, set[str]] = {}
        for name, tokens in (("train", data.train), ("validation", data.validation), ("test", data.test)):
            assert tokens is not None
            assert data.tokenizer is not None
            ids, starts = whole(tokens), [*tokens.document_starts_in(0, len(tokens)).tolist(), len(tokens)]
            found[name] = {data.tokenizer.decode(ids[a:b]) for a, b in itertools.pairwise(starts)}
        return found

    lines = [f"document number {n}" for n in range(400)]
    all_of_them, fewer = split(lines, "one"), split(lines[::-2], "two")
    assert 50 < len(all_of_them["validation"]) < 110
    assert 20 < len(all_of_them["test"]) < 65
    assert set().union(*all_of_them.values()) == set(lines)
    for name, kept in fewer.items():
        assert kept <= all_of_them[name]  # half of the documents, in another order: each stays in its split


@settings(max_examples=150)
@given(
    texts=st.lists(st.text("aé日🙂", min_size=1, max_size=9), min_size=1, max_size=6),
    shares=st.sampled_from(
        [(0.9, 0.1, 0.0), (0.5, 0.25, 0.25), (1.0, 0.0, 0.0), (0.8, 0.0, 0.2), (0.01, 0.99, 0.0)]
    ),
)
def test_a_cut_corpus_loses_nothing_and_keeps_its_order(
    texts: list[str], shares: tuple[float, float, float]
) -> None:
    sizes = np.array([len(text.encode()) for text in texts], dtype=np.uint64)
    size = int(sizes.sum())
    plan = plan_contiguous(sizes, np.ones(len(texts), bool), 0, SplitRatios(*shares).boundaries(size))
    parts = list(assign_chunks(plan, enumerate(TextChunk(text) for text in texts)))
    assert "".join(part.text for part in parts) == "".join(texts)
    places = [part.split for part in parts]
    assert places == sorted(places)
    assert all(part.ends for part in parts)
    assert sum(not part.is_cut for part in parts) == len(texts)  # every document's own end is there once
    assert sum(part.is_whole for part in parts) >= len(texts) - 2
    train = len("".join(part.text for part in parts if part.split == 0).encode())
    assert int(size * shares[0]) <= train <= int(size * shares[0]) + 3


def test_split_ratios_must_add_up() -> None:
    assert SplitRatios.from_config(DataConfig(train_ratio=0.8, val_ratio=0.1)) == SplitRatios(0.8, 0.1, 0.1)
    assert SplitRatios.from_config(DataConfig(val_ratio=0.2)) == SplitRatios(0.8, 0.2, 0.0)
    for wrong in (
        {"train_ratio": 0.95, "val_ratio": 0.1},
        {"train_ratio": 0.5, "val_ratio": 0.1, "test_ratio": 0.1},
        {"val_ratio": 1.0},
    ):
        with pytest.raises(UsageError, match="add up"):
            SplitRatios.from_config(DataConfig(**wrong))


def test_the_tokenizer_is_trained_on_the_training_split_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(
        "plain words here and there. " * 300 + "zqzqzqzq " * 100, encoding="utf-8"
    )
    prepare_dataset(
        DataConfig(input=str(tmp_path / "a.txt"), vocab_size=400, val_ratio=0.2), tmp_path / "out"
    )
    tokenizer = open_prepared_dataset(tmp_path / "out").tokenizer
    assert tokenizer is not None
    assert len(tokenizer.encode("there")) < 3
    assert len(tokenizer.encode("zqzq")) == 4


def test_the_tokenizer_is_trained_on_a_sample_of_the_given_size(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    train = pipeline.train_tokenizer
    monkeypatch.setattr(
        pipeline,
        "train_tokenizer",
        lambda config, given, progress: train(
            config, [seen.append(len(t.encode())) or t for t in given], progress
        ),
    )
    prepare_dataset(
        DataConfig(input=str(texts), vocab_size=300, tokenizer_sample_megabytes=0.02), tmp_path / "out"
    )
    assert 5_000 < sum(seen) <= 20_000
    assert len(seen) > 5  # drawn from all over, not the first so many


def test_the_same_input_and_options_are_found_and_any_change_is_not(texts: Path, tmp_path: Path) -> None:
    options = {"input": str(texts), "vocab_size": 300, "val_ratio": 0.1}
    first = prepare_dataset(DataConfig(**options), tmp_path / "out")
    before = contents(tmp_path / "out")
    again = prepare_dataset(DataConfig(**options, num_workers=3), tmp_path / "out")
    assert (first.from_cache, again.from_cache) == (False, True)
    assert "up to date" in again.lines()[0]
    moved = shutil.copytree(texts, tmp_path / "elsewhere")
    shutil.move(tmp_path / "out", tmp_path / "moved")
    assert prepare_dataset(DataConfig(**{**options, "input": str(moved)}), tmp_path / "moved").from_cache
    assert contents(tmp_path / "moved") == before
    for change in (
        {"vocab_size": 301},
        {"seed": 7},
        {"val_ratio": 0.2},
        {"min_length": 3},
        {"max_length": 8},
        {"tokenizer_type": "char"},
    ):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "moved", tmp_path / "copy")
        assert not prepare_dataset(DataConfig(**{**options, **change}), tmp_path / "copy").from_cache, change
    (texts / "00.txt").write_text("something else", encoding="utf-8")
    assert not prepare_dataset(DataConfig(**options), tmp_path / "moved").from_cache


def test_workers_and_repetition_give_the_same_bytes(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_BATCH_CHARACTERS", 2000)
    for folder, workers in (("one", 1), ("again", 1), ("three", 3)):
        prepare_dataset(DataConfig(input=str(texts), vocab_size=300, num_workers=workers), tmp_path / folder)
    assert contents(tmp_path / "one") == contents(tmp_path / "again") == contents(tmp_path / "three")


def test_a_long_document_in_chunks_has_the_ids_of_the_complete_text(
    tmp_path: Path, tiny_text: str, tiny_tokenizer: Tokenizer
) -> None:
    (tmp_path / "a.txt").write_text(tiny_text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "CHUNK_BYTES", 3000)
        prepare_dataset(
            DataConfig(input=str(tmp_path / "a.txt"), val_ratio=0.0),
            tmp_path / "out",
            tokenizer=tiny_tokenizer,
        )
    data = open_prepared_dataset(tmp_path / "out")
    assert whole(data.train) == [*tiny_tokenizer.encode(tiny_text), tiny_tokenizer.eos_id]
    assert data.train.num_documents == 1
    assert data.validation is None


def test_documents_in_are_documents_kept_and_rejected(tmp_path: Path) -> None:
    good = [f"a good document of some length, number {n}\n" for n in range(30)]
    (tmp_path / "a.txt").write_bytes("".join(good).encode() + b"\n\xff\xfe\nshort\nNUL \0\n")
    config = DataConfig(
        input=str(tmp_path / "a.txt"), one_document_per_line=True, vocab_size=300, min_length=10
    )
    facts = prepare_dataset(config, tmp_path / "out").metadata
    assert (facts.documents_in, facts.documents_kept) == (34, 30)
    assert facts.documents_rejected == {
        "contains NUL": 1,
        "empty": 1,
        "not utf-8": 1,
        "shorter than min_length 10": 1,
    }
    assert Metadata.read(tmp_path / "out") == facts
    assert any("line 32" in example for example in facts.rejected_examples)
    assert (
        sum(split.documents for split in facts.splits.values()) == facts.documents_kept + facts.documents_cut
    )


def test_the_fraction_of_documents_that_keep_their_end_of_text_is_reported(
    texts: Path, tmp_path: Path, tiny_data: Path
) -> None:
    facts = Metadata.read(tiny_data)
    assert facts.supervised_end_share == pytest.approx(40 / (40 + facts.documents_cut))
    assert (
        prepare_dataset(
            DataConfig(input=str(texts), tokenizer_type="char"), tmp_path / "char"
        ).metadata.supervised_end_share
        == 0.0
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b"  \n", "empty"), (b"\xff\xfe\x00", "not utf-8.*byte 0"), (b"a\0", "NUL")],
)
def test_a_corpus_without_usable_text_is_an_error_and_leaves_no_files(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare_dataset(DataConfig(input=str(tmp_path / "a.txt"), vocab_size=300), tmp_path / "out")
    assert contents(tmp_path / "out") == {}


def test_the_error_for_what_cannot_be_prepared_has_the_reason(tmp_path: Path, tiny_texts: list[str]) -> None:
    (tmp_path / "a.txt").write_text(tiny_texts[0], encoding="utf-8")
    text = str(tmp_path / "a.txt")
    for error, options, message in (
        (DataError, {"input": str(tmp_path / "none")}, "does not exist"),
        (
            DataError,
            {"input": text, "vocab_size": 300, "max_length": 100_000},
            "fewer than one window of 100000.*set max_length to at most",
        ),
        (DataError, {"input": text, "vocab_size": 300, "min_length": 10**6, "val_ratio": 0}, "min_length"),
        (DataError, {"input": text, "tokenizer_path": str(tmp_path / "nothing.json")}, "tokenizer"),
        (UsageError, {}, "builtin"),
        (UsageError, {"input": text, "dataset_name": "x/y"}, "give only one"),
        (UsageError, {"input": text, "vocab_size": 100}, "257"),
    ):
        with pytest.raises(error, match=message):
            prepare_dataset(DataConfig(**options), tmp_path / "out")
        assert contents(tmp_path / "out") == {}


def test_characters_that_an_existing_tokenizer_lacks_are_named(tmp_path: Path) -> None:
    Tokenizer.from_characters(["abc "]).save(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("abc x", encoding="utf-8")
    with pytest.raises(DataError, match="'x'"):
        prepare_dataset(
            DataConfig(input=str(tmp_path / "a.txt"), tokenizer_path=str(tmp_path / "tokenizer")),
            tmp_path / "out",
        )


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("a.jsonl", b'{"body": "a text"}\n', "--text_column"),
        ("a.txt", b"caf\xe9", "UTF-8"),
    ],
)
def test_an_input_without_usable_documents_is_an_error_with_advice(
    tmp_path: Path, name: str, content: bytes, advice: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"no usable documents in {name}: 1 .*{advice}"):
        prepare_dataset(DataConfig(input=str(tmp_path / name)), tmp_path / "out")


def test_a_full_disk_leaves_the_old_result_complete(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_dataset(DataConfig(input=str(texts), vocab_size=300), tmp_path / "out")
    before = contents(tmp_path / "out")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "_finish", full)
    with pytest.raises(DataError, match="no space left"):
        prepare_dataset(DataConfig(input=str(texts), vocab_size=310), tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_failure_while_publishing_leaves_no_prepared_folder(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_dataset(DataConfig(input=str(texts), vocab_size=300), tmp_path / "out")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Metadata, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(DataConfig(input=str(texts), vocab_size=310), tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(DataError, match="no prepared data"):
        open_prepared_dataset(tmp_path / "out")
    assert not prepare_dataset(DataConfig(input=str(texts), vocab_size=310), tmp_path / "out").from_cache


@pytest.mark.slow
def test_killed_at_any_moment_it_leaves_a_complete_result_or_none(texts: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from llm_trainer import DataConfig, prepare_dataset\n"
        "print('ready', flush=True)\n"
        "for size in range(300, 400):\n"
        "    prepare_dataset(DataConfig(input=sys.argv[1], vocab_size=size), sys.argv[2])"
    )
    for delay in (0.02, 0.05, 0.1, 0.15, 0.2, 0.3):
        out = tmp_path / f"out-{delay}"
        process = fork_server.start(["-c", program, texts, out], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.wait()
        process.stdout.close()
        if (out / "metadata.json").exists():
            open_prepared_dataset(out)
        prepare_dataset(DataConfig(input=str(texts), vocab_size=299), out)
        assert not list(out.glob(".preparing-*"))
        assert open_prepared_dataset(out).vocab_size == 299


def test_files_of_other_programs_are_not_overwritten(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "dataset").mkdir(parents=True)
    (tmp_path / "out" / "dataset" / "mine.csv").write_text("precious", encoding="utf-8")
    with pytest.raises(DataError, match=r"mine\.csv"):
        prepare_dataset(DataConfig(input=str(texts), vocab_size=300), tmp_path / "out")
    assert (tmp_path / "out" / "dataset" / "mine.csv").read_text(encoding="utf-8") == "precious"


def test_two_preparations_at_once_run_one_after_the_other(texts: Path, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        found = list(
            pool.map(
                lambda _: (
                    prepare_dataset(DataConfig(input=str(texts), vocab_size=300), tmp_path / "out").from_cache
                ),
                range(2),
            )
        )
    assert sorted(found) == [False, True]


def test_links_that_leave_the_input_folder_are_named(tmp_path: Path, texts: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for number in range(5):
        (other / f"{number}.txt").write_text(f"A text number {number} from another folder. " * 20)
        (texts / f"link{number}.txt").symlink_to(other / f"{number}.txt")
    (texts / "inner.txt").symlink_to(texts / "00.txt")
    (texts / "loop.bin").symlink_to(texts / "loop.bin")
    (texts / "folder").symlink_to(other)
    output = io.StringIO()
    prepare_dataset(
        DataConfig(input=str(texts), vocab_size=300),
        tmp_path / "out",
        console=Console(file=output, width=80),
    )
    lines = output.getvalue().splitlines()
    (outside,) = (line for line in lines if line.startswith("read from outside"))
    assert f"link0.txt -> {other / '0.txt'}" in outside
    assert outside.endswith("and 2 more")
    assert "inner" not in outside
    (folders,) = (line for line in lines if line.startswith("not read"))
    assert folders.endswith(f"folder -> {other}")


def test_a_folder_that_is_not_writable_is_named(tmp_path: Path, texts: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="cannot write"), staging.folder_lock(tmp_path / "file"):
        pass


def damaged(tiny_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_data, tmp_path / "damaged"))


def test_files_that_do_not_belong_together_are_refused(
    tiny_data: Path, tmp_path: Path, tiny_texts: list[str]
) -> None:
    folder = damaged(tiny_data, tmp_path)
    Tokenizer.train_bpe(tiny_texts, 310).save(folder)
    with pytest.raises(DataError, match="tokenizer"):
        open_prepared_dataset(folder)
    shutil.copy(tiny_data / "tokenizer.json", folder)
    shutil.copy(folder / "dataset" / "validation-00000.tokens", folder / "dataset" / "train-00000.tokens")
    with pytest.raises(DataError, match=r"train-00000\.tokens"):
        open_prepared_dataset(folder)
    (folder / "dataset" / "train-00000.tokens").unlink()
    with pytest.raises(DataError, match=r"train-00000\.tokens.*missing"):
        open_prepared_dataset(folder)
    (folder / "metadata.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"metadata\.json is damaged"):
        open_prepared_dataset(folder)
    facts = json.loads((tiny_data / "metadata.json").read_text(encoding="utf-8"))
    (folder / "metadata.json").write_text(json.dumps({**facts, "documents_kept": 1}), encoding="utf-8")
    with pytest.raises(DataError, match="damaged"):
        open_prepared_dataset(folder)


def test_the_error_for_a_missing_or_empty_data_folder_explains_how_to_prepare(tmp_path: Path) -> None:
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(DataError, match="llm-trainer prepare"):
            open_prepared_dataset(folder)


def test_a_vocabulary_larger_than_the_embedding_is_refused() -> None:
    tokens = TokenDataset.from_ids(np.arange(50), vocab_size=60)
    check_vocabulary(tokens, 50)
    with pytest.raises(DataError, match=r"id 49.*vocab_size is 49"):
        check_vocabulary(tokens, 49)
