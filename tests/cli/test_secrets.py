"""Keys and tokens stay where they were put: nothing that a command writes or prints holds one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_trainer.cli.main import main
from llm_trainer.config.environment import ENVIRONMENT_NAMES

KEYS = {
    "HF_TOKEN": "hf_SecretOfTheHub0123456789abcdefghij",
    "WANDB_API_KEY": "5ec4e7" * 6 + "cafe",
    "LLM_TRAINER_API_KEYS": "sk-first-secret,sk-second-secret",
    "AWS_SECRET_ACCESS_KEY": "aws/Secret+Of+The+Bucket",
}
SECRETS = [secret for keys in KEYS.values() for secret in keys.split(",")]


@pytest.fixture(params=["shell", "dotenv"])
def with_keys(request: pytest.FixtureRequest, place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in, with all keys in the shell or those that we read in `.env`."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name, key in KEYS.items():
        monkeypatch.delenv(name, raising=False)
        if request.param == "shell" or name not in ENVIRONMENT_NAMES:
            monkeypatch.setenv(name, key)
    if request.param == "dotenv":
        (place / ".env").write_text(
            "".join(f"{name}={KEYS[name]}\n" for name in KEYS if name in ENVIRONMENT_NAMES), encoding="utf-8"
        )
    before = dict(os.environ)
    yield place
    for name in KEYS.keys() & os.environ.keys() - before.keys():  # what .env put there
        del os.environ[name]


def leaks(folder: Path) -> list[str]:
    """Files of a folder that hold a secret, `.env` left out."""
    files = [
        path for path in folder.rglob("*") if path.is_file() and not path.is_symlink() and path.name != ".env"
    ]
    assert files
    return [
        f"{path}: {secret[:6]}…"
        for path in files
        for secret in SECRETS
        if secret.encode() in path.read_bytes()
    ]


def test_a_run_and_its_report_hold_no_key(with_keys: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train = [
        "train",
        "--data_dir=data/prepared/text",
        "--hidden_size=16",
        "--num_layers=1",
        "--num_heads=2",
        "--max_length=16",
    ]
    run = [
        "--batch_size=2",
        "--max_steps=2",
        "--compile=off",
        "--output_dir=run",
        "--report_to=tensorboard,wandb",
    ]
    assert main([*train, *run]) == 0
    assert main([*train, *run, "--explain"]) == 0
    assert main(["report", "run"]) == 0
    assert os.environ["HF_TOKEN"] == KEYS["HF_TOKEN"], "the keys were there to be leaked"
    written = {path.name for path in (with_keys / "run").rglob("*")}
    assert {"run.json", "metrics.jsonl", "report.html", "train.log", "wandb"} <= written
    assert leaks(with_keys) == []
    assert not [secret for secret in SECRETS if secret in "".join(capfd.readouterr())]


@pytest.mark.parametrize(
    "arguments",
    [["--hf_token=KEY"], ["--hf_token", "KEY"], ["--config", "keys.yaml"], ["--set_api_key", "KEY"]],
)
def test_a_key_among_the_settings_is_refused_without_being_repeated(
    place: Path, arguments: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    key = KEYS["HF_TOKEN"]
    (place / "keys.yaml").write_text(f"training:\n  wandb_api_key: {key}\n", encoding="utf-8")
    assert (
        main(["train", *(argument.replace("KEY", key) for argument in arguments), "--output_dir=refused"])
        == 2
    )
    said = "".join(capfd.readouterr())
    assert "key" in said or "token" in said
    assert key not in said
    assert not (place / "refused").exists()
