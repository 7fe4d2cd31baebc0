"""`python -O` leaves out every assert: none may do anything that the program needs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

# What an assert may call: functions without an effect.
PURE = {
    *(
        "all",
        "any",
        "callable",
        "hasattr",
        "id",
        "isinstance",
        "issubclass",
        "len",
        "map",
        "max",
        "min",
        "set",
    ),
    *("sorted", "sum", "Fraction", "array", "math.isfinite", "range", "zip", "table.get"),
}
FOLDERS = ("llm_trainer", "scripts", "examples", "data")


def effects(code: str) -> list[str]:
    """What the asserts of a program do besides judging: calls that are not known as pure, assignments."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Assert):
            for inner in ast.walk(node.test):
                is_call = isinstance(inner, ast.Call) and ast.unparse(inner.func) not in PURE
                if is_call or isinstance(inner, (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)):
                    found.append(f"line {node.lineno}: {ast.unparse(inner)}")
    return found


def programs() -> Iterator[Path]:
    yield from ROOT.glob("*.py")
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.py"))


def test_effects_are_found() -> None:
    assert effects("assert table.setdefault(a, b) == b") == ["line 1: table.setdefault(a, b)"]
    assert effects("assert (n := 3)") == ["line 1: (n := 3)"]
    assert effects("assert isinstance(a, int) and len(b) == 3, f'{c.pop()}'") == []


def test_no_assert_has_an_effect() -> None:
    found = [
        f"{path.relative_to(ROOT)}, {line}"
        for path in programs()
        for line in effects(path.read_text("utf-8"))
    ]
    assert found == []


def run_without_asserts(folder: Path, *words: str) -> str:
    """The output of a command under `python -O`."""
    program = f"from llm_trainer.cli.main import main; raise SystemExit(main({list(words)!r}))"
    done = subprocess.run(
        [sys.executable, "-O", "-c", program],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_settings_are_read_under_python_without_asserts(tmp_path: Path) -> None:
    shown = run_without_asserts(tmp_path, "train", "--n_embd=96", "--lr=1e-3", "--explain")
    assert "model.hidden_size" in shown
    assert "--n_embd" in shown


@pytest.mark.slow
def test_commands_run_under_python_without_asserts(tmp_path: Path) -> None:
    lines = (f"Line {number}: {number * 7} foxes over {number % 13} dogs.\n" for number in range(2000))
    (tmp_path / "text.txt").write_text("".join(lines), encoding="utf-8")
    run_without_asserts(tmp_path, "prepare", "--input=text.txt", "--output_dir=data", "--vocab_size=300")
    shape = ["--hidden_size=32", "--num_layers=2", "--num_heads=4", "--context_length=32"]
    train = ["train", "--data_dir=data", "--output_dir=run", "--batch_size=4", "--compile=off"]
    run_without_asserts(tmp_path, *train, *shape, "--max_steps=2")
    run_without_asserts(tmp_path, *train, "--max_steps=3", "--lr_on_resume=extend", "--resume")
    assert run_without_asserts(tmp_path, "generate", "run", "--prompt=Line", "--max_tokens=4").startswith(
        "Line"
    )
