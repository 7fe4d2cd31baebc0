"""A folder to stand in with prepared data and a small trained run, made once; tests that change something
take a copy.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_trainer.cli.main import main

TEXT = "".join(
    f"line {number}: the quick brown fox jumps over {number * 7} lazy dogs.\n" for number in range(400)
)
SHAPE = ["--hidden_size=32", "--num_layers=2", "--num_heads=4", "--max_length=32"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`text.txt`, `data/prepared/text` (BPE) and `checkpoints` of a run of six steps."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert (
            main(
                [
                    "train",
                    "--input=text.txt",
                    "--data.vocab_size=300",
                    *SHAPE,
                    "--batch_size=4",
                    "--max_steps=6",
                    "--save_interval=2",
                    "--compile=off",
                ]
            )
            == 0
        )
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def place(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `finished`, which is the current folder."""
    copy = tmp_path / "place"
    shutil.copytree(finished, copy, symlinks=True)
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail: checks the exit status and that there is no traceback, returns what it
    said on stderr.
    """

    def run(*arguments: str, status: int) -> str:
        capsys.readouterr()
        assert main(list(arguments)) == status
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert said.startswith("error: ")
        return said

    return run
