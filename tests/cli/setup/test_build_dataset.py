"""Packing and mixtures through the commands: what preparation was told holds in training, flags may say
otherwise, mixtures are folders.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_trainer.cli.main import main
from llm_trainer.config.saved_run import read_run_config
from llm_trainer.data.metadata import Metadata
from llm_trainer.run_dir import resolve_resume_folder
from llm_trainer.training.logging.metrics import read_metrics

SMALL = [
    "--hidden_size=32",
    "--num_layers=2",
    "--num_heads=4",
    "--batch_size=4",
    "--max_steps=6",
    "--save_interval=2",
    "--compile=off",
]
LINES = [
    f"line {number}: the quick brown fox jumps over {number * 7} lazy dogs.\n" * (1 + number % 5)
    for number in range(120)
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Texts of two kinds; the current folder."""
    monkeypatch.chdir(tmp_path)
    for name, lines in {
        "foxes": LINES,
        "numbers": [" ".join(map(str, range(n, n + 40))) for n in range(120)],
    }.items():
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8"
        )
    return tmp_path


def prepare(name: str, *more: str) -> None:
    assert (
        main(
            [
                "prepare",
                f"--input={name}.jsonl",
                f"--output_dir=data/{name}",
                "--vocab_size=300",
                "--max_length=64",
                *more,
            ]
        )
        == 0
    )


def run_settings() -> object:
    return read_run_config(resolve_resume_folder(Path("checkpoints"))).data


def test_training_packs_as_preparation_was_told_and_flags_say_otherwise(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare("foxes", "--packing_strategy=first_fit", "--stride=8")
    said = capsys.readouterr().out + capsys.readouterr().err
    assert "first_fit" in said
    assert "overlap" in said
    assert Metadata.read(folder / "data" / "foxes").options["packing"] == {
        "strategy": "first_fit",
        "stride": 8,
    }
    assert main(["train", "--data_dir=data/foxes", *SMALL]) == 0
    assert "first_fit, stride 8" in "".join(capsys.readouterr())
    settings = run_settings()
    assert (settings.packing_strategy, settings.stride) == ("first_fit", 8)  # type: ignore[attr-defined]
    assert (
        main(
            [
                "train",
                "--data_dir=data/foxes",
                *SMALL,
                "--stride=0",
                "--pack_sequences=False",
                "--packing_strategy=greedy",
            ]
        )
        == 0
    )
    settings = run_settings()
    assert (settings.pack_sequences, settings.stride) == (False, 0)  # type: ignore[attr-defined]


def test_a_packed_run_is_resumed_and_verified_with_its_own_packing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare("foxes", "--packing_strategy=first_fit")
    assert main(["train", "--data_dir=data/foxes", *SMALL]) == 0
    assert main(["verify-resume", "checkpoints", "--steps=4"]) == 0
    assert main(["train", "--resume=checkpoints", "--max_steps=8", "--lr_on_resume=extend"]) == 0


def test_a_mixture_trains_resumes_and_tells_its_shares(
    folder: Path, capsys: pytest.CaptureFixture[str], fails: Callable[..., str]
) -> None:
    prepare("foxes")
    prepare("numbers", "--tokenizer_path=data/foxes")
    content = {"members": {"foxes": "foxes", "numbers": "numbers"}, "weights": {"foxes": 1, "numbers": 3}}
    (folder / "data" / "mixture.json").write_text(json.dumps(content), encoding="utf-8")
    assert main(["train", "--data_dir=data", *SMALL, "--logging_steps=1"]) == 0
    assert "foxes 25.0%, numbers 75.0%" in "".join(capsys.readouterr())
    lines = [line for line in read_metrics(Path("checkpoints")) if "loss" in line]
    assert sum(line["share/numbers"] for line in lines) / len(lines) == pytest.approx(0.75, abs=0.1)
    assert main(["verify-resume", "checkpoints", "--steps=4"]) == 0
    first, second = {"foxes": 1, "numbers": 0}, {"foxes": 0, "numbers": 1}
    stages = json.dumps([{"until": "3 steps", "weights": first}, {"weights": second}])
    assert "trained on the samples in the order" in fails(
        "train", "--resume=checkpoints", f"--mixture_stages={stages}", status=1
    )
    assert main(["train", "--data_dir=data", *SMALL, "--logging_steps=1", f"--mixture_stages={stages}"]) == 0
    shares = [line["share/foxes"] for line in read_metrics(Path("checkpoints")) if "loss" in line]
    assert shares == [1, 1, 1, 0, 0, 0]
    assert main(["verify-resume", "checkpoints", "--steps=4"]) == 0
    assert main(["evaluate", "checkpoints", "--data", "data"]) == 0


def test_weights_for_what_is_no_mixture_and_contradictions_are_refused(
    folder: Path, fails: Callable[..., str]
) -> None:
    prepare("foxes")
    assert "is a single corpus" in fails(
        "train", "--data_dir=data/foxes", *SMALL, '--mixture_weights={"foxes": 1}', status=2
    )
    packed = fails(
        "train",
        "--data_dir=data/foxes",
        *SMALL,
        "--pack_sequences=False",
        "--packing_strategy=first_fit",
        status=2,
    )
    assert "packing_strategy" in packed
    assert "must overlap by fewer" in fails(
        "prepare", "--input=foxes.jsonl", "--max_length=64", "--stride=64", status=2
    )
    assert "stride=64 must be smaller than" in fails(
        "train", "--data_dir=data/foxes", *SMALL, "--stride=64", status=2
    )


def test_noise_is_a_matter_of_flags(folder: Path) -> None:
    prepare("foxes")
    noise = ["--augment_span_drop=0.1", "--augment_case=0.1", "--augment_whitespace=0.1"]
    assert main(["train", "--data_dir=data/foxes", *SMALL, *noise]) == 0
    assert main(["verify-resume", "checkpoints", "--steps=4"]) == 0
