"""Metrics for Weights & Biases without a login: one line, before anything is made."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from tiny_run import tiny_trainer

from llm_trainer.cli.main import main
from llm_trainer.config import UsageError
from llm_trainer.training.logging.metrics import check_wandb_login

wandb = pytest.importorskip("wandb")
TEXT = "the quick brown fox jumps over the lazy dog.\n" * 400


@pytest.fixture(autouse=True)
def _no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


def test_a_run_is_refused_before_its_folder_is_made(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", report_to=["wandb"], console=Console(quiet=True))
    with pytest.raises(UsageError, match=r"needs a login.*wandb login.*WANDB_API_KEY.*WANDB_MODE=offline"):
        trainer.train()
    assert not (tmp_path / "run").exists()


def test_the_command_prepares_nothing_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--input=text.txt", "--report_to=wandb", "--max_steps=2"]) == 2
    printed = capsys.readouterr().err
    assert "error: report_to wandb needs a login" in printed
    assert "Traceback" not in printed
    assert {path.name for path in tmp_path.iterdir()} <= {"text.txt", "home"}


@pytest.mark.parametrize(
    ("name", "value"), [("WANDB_MODE", "offline"), ("WANDB_MODE", "disabled"), ("WANDB_API_KEY", "a" * 40)]
)
def test_a_key_or_an_offline_mode_is_enough(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    check_wandb_login(["wandb"])


def test_a_refusal_by_the_library_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**settings: object) -> None:
        raise wandb.errors.CommError("permission denied")

    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UsageError, match="refused the run: permission denied"):
        tiny_trainer(tmp_path / "run", report_to=["wandb"], console=Console(quiet=True)).train()
