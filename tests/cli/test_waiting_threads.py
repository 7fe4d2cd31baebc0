"""Threads that wait do not keep the processors from others."""

from __future__ import annotations

import os

import pytest

from llm_trainer.cli.main import main
from llm_trainer.cli.waiting_threads import SPINS


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
def test_what_the_user_set_holds(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(name, "7" if name == "GOMP_SPINCOUNT" else "ACTIVE")
    assert main(["presets"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == ("7" if name == "GOMP_SPINCOUNT" else None)
