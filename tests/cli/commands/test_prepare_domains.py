"""Domains from the command line: listing, preparing, training on them, processing them further."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_trainer.cli.main import main
from llm_trainer.cli.scripts import script
from llm_trainer.config.schema.domain_loaders import shipped_loaders
from llm_trainer.data.prepared_dataset import open_prepared_dataset
from llm_trainer.data.sampling.mixture import MixtureDataset

RUN = ["--hidden_size=32", "--num_layers=2", "--num_heads=4", "--max_seq_len=32", "--vocab_size=300"]
RUN += ["--max_steps=2", "--batch_size=2", "--compile=off"]
DOOR = "scripts/prepare_domain_datasets.py"


@pytest.fixture
def bridge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bridge file for two loaders with local files, in the current folder."""
    monkeypatch.chdir(tmp_path)
    sums = [
        {"problem": f"What is {number} and {number}?", "solution": f"{2 * number}", "level": "Level 1"}
        for number in range(100)
    ]
    talks = [
        {
            "conversation": [{"role": "user", "content": f"Hello number {number}, how are you?"}],
            "toxic": False,
        }
        for number in range(100)
    ]
    Path("raw").mkdir()
    for name, records in (("load_math", sums), ("load_wildchat", talks)):
        Path(f"raw/{name}.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    content = {
        "_about": "a remark",
        "loaders": {"load_math": {"max_samples": 90}, "load_wildchat": {}},
        "domain_weights": {"math": 3, "general": 1},
        "local_dir": "raw",
        "tokenizer_vocab_size": 300,
        "output_dir": "domains",
    }
    Path("bridge.json").write_text(json.dumps(content), encoding="utf-8")
    return Path("bridge.json")


def test_every_loader_is_listed_with_its_name_on_the_hub_and_its_licence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert script(DOOR, ["--list_loaders"]) == 0
    said = capsys.readouterr().out
    for name, row in shipped_loaders().items():
        assert f"{name}  {row.hub[0].name}" in said
        assert row.licence in " ".join(said.split())
    assert main(["prepare-domains", "--list-loaders"]) == 0
    assert capsys.readouterr().out == said


def test_a_loader_of_ones_own_is_listed_too(bridge: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(
        "load_recipes: {domain: general, path: recipes.csv, text: '{title}', licence: mine}\n",
        encoding="utf-8",
    )
    assert script(DOOR, ["--config", str(bridge), "--loader_files", "mine.yaml", "--list_loaders"]) == 0
    assert "load_recipes  recipes.csv" in capsys.readouterr().out


def test_domains_are_prepared_and_trained_on_in_their_shares(
    bridge: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script(DOOR, ["--config", str(bridge), "--seed", "7", "--extract-vocab"]) == 0
    said = capsys.readouterr().out
    assert "load_math (raw/load_math.jsonl): 90 texts of 90 records" in said
    assert "75.0% of the mixture" in said
    assert json.loads(Path("domains/domains.json").read_text(encoding="utf-8"))["seed"] == 7
    assert Path("domains/math/vocabulary.json").is_file()
    assert isinstance(open_prepared_dataset("domains").train, MixtureDataset)
    command = ["--use_domain_specific_data", "--domain_data_dir=domains", "--output_dir=run", *RUN]
    assert script("train_aio.py", command) == 0
    said = capsys.readouterr().out
    assert "math 75.0%" in said
    assert "built-in" not in said
    assert Path("run/final_model/model.safetensors").is_file()
    assert main(["train", *command[:2], "--output_dir=other", *RUN]) == 0
    assert main(["train", "--resume=other", "--max_steps=3", "--lr_on_resume=extend"]) == 0
    assert "math 75.0%" in capsys.readouterr().out
    assert (
        script(
            "train_aio.py",
            ["--resume=run", "--use_domain_specific_data", "--max_steps=3", "--lr_on_resume=extend"],
        )
        == 0
    )


def test_a_mixture_goes_through_process_data_whole(bridge: Path) -> None:
    assert script(DOOR, ["--config", str(bridge)]) == 0
    assert (
        script("scripts/process_data.py", ["--input_dir=domains", "--output_dir=ready", "--mode=train"]) == 0
    )
    before, after = open_prepared_dataset("domains"), open_prepared_dataset("ready")
    assert after.train.fingerprint == before.train.fingerprint
    assert json.loads(Path("ready/mixture.json").read_text(encoding="utf-8"))["weights"] == {
        "math": 3,
        "general": 1,
    }
    assert (
        script(
            "scripts/process_data.py",
            ["--input_dir=domains/math/texts", "--output_dir=ready", "--vocab_size=300"],
        )
        == 0
    )
    assert not Path("ready/mixture.json").exists()
    assert open_prepared_dataset("ready").metadata.documents_kept == 90


def test_splits_in_tables_are_processed_as_texts_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    Path("splits").mkdir()
    for name, count in (("train", 60), ("val", 5)):
        pq.write_table(
            pa.table({"text": [f"{name} text number {number}" for number in range(count)]}),
            f"splits/{name}.parquet",
        )
    assert (
        script("scripts/process_data.py", ["--input_dir=splits", "--output_dir=ready", "--vocab_size=300"])
        == 0
    )
    splits = open_prepared_dataset("ready").metadata.splits
    assert {name: facts.documents for name, facts in splits.items()} == {"train": 60, "validation": 5}


def test_mode_student_refuses_by_name(fails: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    assert script("scripts/process_data.py", ["--mode=student", "--student_model_path=nowhere"]) == 2
    assert "--mode student" in capsys.readouterr().err


@pytest.mark.slow
def test_without_domains_and_without_a_network_the_built_in_ones_are_used_and_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert script("train_aio.py", ["--use_domain_specific_data", *RUN]) == 0
    said = capsys.readouterr().out
    assert "no domains are prepared in data/domain_specific; using the built-in ones" in said
    assert "prepare_domain_datasets.py --config" in said
    mixture = json.loads(Path("data/domain_builtin/mixture.json").read_text(encoding="utf-8"))
    assert set(mixture["members"]) == {
        "math", "science", "coding", "logic", "reasoning", "general",
    }  # fmt: skip
    assert Path("models/final/model.safetensors").is_file()
    assert script("train_aio.py", ["--use_domain_specific_data", "--output_dir=again", *RUN]) == 0
    assert "learning a tokenizer" not in capsys.readouterr().out  # found, not made again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no loaders are named"),
        (["bridge.json"], "given as --config FILE"),
        (["--config", "nowhere.json"], "nowhere.json"),
        (["--config", "bridge.json", "--max_examples_per_domain", "0"], "must be greater than 0"),
        (["--config", "bridge.json", "--vocab_sise", "5"], "did you mean vocab_size"),
        (["--config", "bridge.json", "--domain_weights", '{"maths": 2}'], "did you mean math"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_message(
    arguments: list[str], message: str, bridge: Path, fails: Callable[..., str]
) -> None:
    assert message in fails("prepare-domains", *arguments, status=2)


def test_training_on_domains_that_are_not_there_says_how_to_make_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = fails("train", "--use_domain_specific_data", status=2)
    assert "no domains are prepared in data/domain_specific" in said
    assert "--builtin" in said
    said = fails("train", "--use_domain_specific_data", "--data_dir=somewhere", status=2)
    assert "both name the data to train on" in said


def test_values_are_explained_without_preparing(bridge: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script(DOOR, ["--config", str(bridge), "--explain"]) == 0
    assert "output_dir = 'domains'" in capsys.readouterr().out
    assert not Path("domains").exists()
