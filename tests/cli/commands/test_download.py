"""`scripts/download_datasets.py`: what is listed, taken from a folder, and said where there is no network."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_trainer.cli.scripts import script
from llm_trainer.data.catalog import http_download as downloads
from llm_trainer.data.catalog.registry import DATASETS

SCRIPT = "scripts/download_datasets.py"


def test_the_list_names_every_set_with_its_size_and_licence(capsys: pytest.CaptureFixture[str]) -> None:
    assert script(SCRIPT, ["--list"]) == 0
    told = capsys.readouterr().out
    for name, row in DATASETS.items():
        assert f"{name} (" in told
        assert row.licence in told
    assert script(SCRIPT, ["--list", "--datasets", "imdb_reviews"]) == 0
    assert capsys.readouterr().out.startswith("imdb_reviews (80 MB, ")


def test_sets_are_taken_from_a_folder_in_place_of_the_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tiny_shakespeare", "tinystories"):
        (tmp_path / "here" / name).mkdir(parents=True)
        (tmp_path / "here" / name / "a.txt").write_text(f"a text of {name}\nwith a break", encoding="utf-8")
    chosen = [
        "--datasets",
        "tiny_shakespeare,tinystories",
        "--output-dir",
        str(tmp_path / "raw"),
        "--save-format",
        "jsonl",
    ]
    assert script(SCRIPT, [*chosen, "--input", str(tmp_path / "here")]) == 0
    assert (
        (tmp_path / "raw" / "tinystories" / "train-00000.jsonl")
        .read_text(encoding="utf-8")
        .startswith('{"text": "a text of tinystories')
    )
    assert "tinystories: 1 documents in = 1 kept + 0 rejected" in capsys.readouterr().out
    assert script(SCRIPT, chosen) == 0, "they are there, so no network is needed"
    assert capsys.readouterr().out.count("exists already") == 2


def test_without_a_network_the_first_set_is_named_and_how_to_bring_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise downloads.NoConnectionError("https://example.org could not be fetched (no network)")

    monkeypatch.setattr("llm_trainer.data.catalog.fetch_dataset.download", unreachable)
    assert script(SCRIPT, ["--save-format", "parquet", "--output-dir", str(tmp_path / "raw")]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: the dataset 'tiny_shakespeare' could not be downloaded")
    assert "--datasets tiny_shakespeare --input FOLDER" in told
    assert told.count("could not be downloaded:") == 1, "without a network the others are not tried"
    assert not (tmp_path / "raw" / "tiny_shakespeare").exists()


def test_one_set_that_cannot_be_had_does_not_keep_others_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here" / "tinystories").mkdir(parents=True)
    (tmp_path / "here" / "tinystories" / "a.txt").write_text("text", encoding="utf-8")
    chosen = [
        "--datasets",
        "imdb_reviews,tinystories",
        "--output",
        str(tmp_path / "raw"),
        "--input",
        str(tmp_path / "here"),
    ]
    assert script(SCRIPT, chosen) == 1
    assert "has no folder imdb_reviews" in capsys.readouterr().err
    assert (tmp_path / "raw" / "tinystories" / "train-00000.parquet").is_file()


def test_an_unknown_name_is_refused_with_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    assert script(SCRIPT, ["--datasets", "fineweb"]) == 2
    assert "did you mean fineweb_10bt" in capsys.readouterr().err
