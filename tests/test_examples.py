"""Every example runs to its end and prints what it promises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

EXAMPLES = ROOT / "examples"
PRINTS = {
    "pretrain.py": "validation loss",
    "finetune_lora.py": "validation loss on sums",
    "custom_objective.py": "validation loss",
    "custom_callback.py": "weight norms: ",
    "growth_schedule.py": "final shape: 4 layers, MLP width 512",
}


def test_every_example_is_tested_and_on_the_page() -> None:
    programs = {path.name for path in EXAMPLES.glob("*.py")}
    assert programs == set(PRINTS)
    page = (ROOT / "docs" / "tutorials" / "examples.md").read_text(encoding="utf-8")
    for path in EXAMPLES.rglob("*.*"):
        if path.suffix in (".py", ".sbatch"):
            assert f'--8<-- "{path.relative_to(ROOT).as_posix()}"' in page, path


@pytest.mark.slow
@pytest.mark.parametrize("name", PRINTS)
def test_the_example_runs(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), "--steps", "6", "--output_dir", str(tmp_path / "run")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert PRINTS[name] in done.stdout, done.stdout


def test_the_slurm_script_is_valid_bash() -> None:
    done = subprocess.run(
        ["bash", "-n", str(EXAMPLES / "slurm" / "train.sbatch")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
