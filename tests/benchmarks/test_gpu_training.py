"""A benchmark that needs a GPU says so where there is none, and is no failure."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from paths import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu_training.py"


@pytest.mark.slow
def test_without_a_gpu_there_is_nothing_to_measure() -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "no GPU that PyTorch can use: nothing to measure"), (
        done.stderr
    )
