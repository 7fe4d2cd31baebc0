"""Splits as files: nothing is lost or mixed up between texts and shards."""

from __future__ import annotations

import json
from pathlib import Path

from llm_trainer.cli.main import main
from llm_trainer.cli.scripts import script
from llm_trainer.cli.setup.export_splits import documents, publish_shards
from llm_trainer.data.prepared_dataset import open_prepared_dataset


def test_a_sample_a_line_is_split_without_loss(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    lines = [f"sample {number} says {number * number}" for number in range(300)]
    Path("text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert (
        script("scripts/prepare_data.py", ["--input", "text.txt", "--output", "out", "--vocab-size", "300"])
        == 0
    )
    written = [
        line
        for name in ("train", "val", "test")
        for line in Path(f"out/{name}.txt").read_text(encoding="utf-8").splitlines()
    ]
    assert sorted(written) == sorted(lines)


def test_documents_with_line_breaks_become_json_lines(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    texts = [f"def f{number}():\n    return {number}" for number in range(100)]
    Path("texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8"
    )
    assert (
        script(
            "scripts/prepare_data.py", ["--input", "texts.jsonl", "--output", "out", "--vocab-size", "300"]
        )
        == 0
    )
    written = [
        json.loads(line)["text"]
        for name in ("train", "val", "test")
        for line in Path(f"out/{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert sorted(written) == sorted(texts)
    assert not Path("out/train.txt").exists()


def test_the_door_to_splits_cleans_and_drops_near_duplicates_unless_told_not_to(
    tmp_path: Path, monkeypatch, capsys
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    lines = [f"sample {number} says\u00a0{number * number}  " for number in range(300)]
    lines += ["Skip to content", "Sample 7 says: 49!"]
    Path("text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = ["--input", "text.txt", "--output", "out", "--vocab-size", "300"]
    assert script("scripts/prepare_data.py", command) == 0
    assert "302 in = 300 kept + 2 rejected" in capsys.readouterr().out
    written = [
        line
        for name in ("train", "val", "test")
        for line in Path(f"out/{name}.txt").read_text(encoding="utf-8").splitlines()
    ]
    assert sorted(written) == sorted(f"sample {number} says {number * number}" for number in range(300))
    assert script("scripts/prepare_data.py", [*command, "--clean=False", "--deduplicate=none"]) == 0
    assert "302 in = 302 kept + 0 rejected" in capsys.readouterr().out


def test_shards_made_from_split_texts_keep_each_document_in_its_split(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    splits = {
        "train": [f"training {number}" for number in range(50)],
        "val": ["held out one", "held out two"],
        "test": ["a test"],
    }
    Path("splits").mkdir()
    for name, lines in splits.items():
        Path(f"splits/{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert (
        script(
            "scripts/process_data.py",
            ["--input_dir=splits", "--output_dir=ready", "--mode=train", "--vocab_size=300"],
        )
        == 0
    )
    prepared = open_prepared_dataset("ready")
    assert prepared.tokenizer is not None
    assert prepared.validation is not None
    assert prepared.test is not None
    assert list(documents(prepared.train, prepared.tokenizer)) == splits["train"]
    assert list(documents(prepared.validation, prepared.tokenizer)) == splits["val"]
    assert list(documents(prepared.test, prepared.tokenizer)) == splits["test"]


def test_published_shards_are_the_same_data(place: Path) -> None:
    publish_shards(Path("data/prepared/text"), Path("ready"))
    assert (
        open_prepared_dataset("ready").train.fingerprint
        == open_prepared_dataset("data/prepared/text").train.fingerprint
    )


def test_outputs_and_a_report_of_a_model_on_held_out_text(place: Path) -> None:
    command = [
        "--input_dir=data/prepared/text",
        "--output_dir=inference",
        "--mode=inference",
        "--student_model_path=checkpoints",
        "--max_tokens=4",
    ]
    assert script("scripts/process_data.py", command) == 0
    report = json.loads(Path("inference/validation_report.json").read_text(encoding="utf-8"))
    outputs = [
        json.loads(line) for line in Path("inference/outputs.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert report["outputs"] == len(outputs) > 0
    assert 0 < report["val_loss"] < 7
    assert main(["evaluate", "checkpoints", "data/prepared/text"]) == 0


def test_texts_are_those_that_were_read_whatever_the_tokenizer(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    lines = [
        f"Sample  {number}   says “{number * number}” …" for number in range(300)
    ]  # WordPiece gives no such spaces back
    Path("text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [
        "--input",
        "text.txt",
        "--output",
        "out",
        "--vocab-size",
        "300",
        "--tokenizer_type",
        "wordpiece",
        "--clean",
        "False",
    ]
    assert script("scripts/prepare_data.py", [*command, "--deduplicate", "none"]) == 0
    written = [
        line
        for name in ("train", "val", "test")
        for line in Path(f"out/{name}.txt").read_text(encoding="utf-8").splitlines()
    ]
    assert sorted(written) == sorted(lines)


def test_the_input_is_not_overwritten_by_a_split(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    Path("train.txt").write_text("precious\n", encoding="utf-8")
    assert script("scripts/prepare_data.py", ["--input", "train.txt", "--output", "."]) == 2
    assert Path("train.txt").read_text(encoding="utf-8") == "precious\n"
