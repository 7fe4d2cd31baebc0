"""A reader that goes away, as `| head` does, ends a command quietly; an output that is full is an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from llm_trainer.cli.main import COMMANDS

PROGRAM = [sys.executable, "-m", "llm_trainer"]
QUESTIONS = [
    ["--help"],
    ["--version"],
    ["help"],
    *([command, "--help"] for command in COMMANDS),
    ["train", "--explain"],
    ["presets"],
]


def closed_pipe() -> int:
    """The writing end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def run(
    command: list[str], *, stdout: int, stderr: int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, stdout=stdout, stderr=stderr, text=True, cwd=ROOT, timeout=120, check=False
    )


@pytest.mark.parametrize("question", QUESTIONS, ids=" ".join)
def test_a_command_whose_output_nobody_reads_ends_quietly(question: list[str]) -> None:
    done = run([*PROGRAM, *question], stdout=closed_pipe())
    assert done.stderr == ""
    assert done.returncode == 1


@pytest.mark.parametrize("name", ["train.py", "scripts/train.py"])
def test_a_script_whose_output_nobody_reads_ends_quietly(name: str) -> None:
    done = run([sys.executable, str(ROOT / name), "--help"], stdout=closed_pipe())
    assert done.stderr == ""
    assert done.returncode == 1


@pytest.mark.parametrize("wrong", [["nonsense"], ["train", "--nonsense"], ["train", "--data_dir=/nowhere"]])
def test_an_error_that_nobody_reads_keeps_its_code(wrong: list[str], tmp_path: Path) -> None:
    expected = run([*PROGRAM, *wrong], stdout=subprocess.PIPE).returncode
    assert expected in (1, 2)
    unread = closed_pipe()
    assert run([*PROGRAM, *wrong], stdout=unread, stderr=unread).returncode == expected


def test_a_full_output_is_an_error() -> None:
    with Path("/dev/full").open("w") as full:
        done = run([*PROGRAM, "train", "--help"], stdout=full.fileno())
    assert done.stderr.startswith("error: no space left")
    assert done.returncode == 1


def test_a_closed_output_is_none() -> None:
    done = subprocess.run(
        ["sh", "-c", '"$0" -m llm_trainer --help >&-', sys.executable],
        stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
