"""A command's process keeps its memory, and its waiting threads leave the processors to others."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from llm_trainer.cli.main import main
from llm_trainer.cli.runtime_env import SPINS

FAULTS = """
import resource, sys
import torch
from llm_trainer.cli.runtime_env import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit(77)
def step():
    held = [torch.ones(1 << 20) for _ in range(8)]
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_a_step_after_the_first_needs_no_fresh_pages() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, "kept"], capture_output=True, text=True, encoding="utf-8"
    )
    if done.returncode == 77:
        pytest.skip("this C library has no mallopt")
    assert int(done.stdout) < 100  # 5 steps of 8 x 4 MiB are 40,960 pages


@pytest.fixture
def _no_thread_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that what the test sets is undone
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("_no_thread_settings")
def test_commands_let_waiting_threads_sleep(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    assert os.environ["GOMP_SPINCOUNT"] == SPINS


@pytest.mark.usefixtures("_no_thread_settings")
@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_what_the_user_set_holds(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "7" if name == "GOMP_SPINCOUNT" else "ACTIVE")
    assert main(["presets"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == ("7" if name == "GOMP_SPINCOUNT" else None)
