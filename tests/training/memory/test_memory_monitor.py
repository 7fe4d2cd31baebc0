"""Memory and load are in the metrics; memory that runs short is logged and answered with a checkpoint."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tiny_run import tiny_config, tiny_run, tiny_trainer

from llm_trainer.run_dir import list_checkpoints
from llm_trainer.training.logging.metrics import read_metrics
from llm_trainer.training.logging.timers import StepTimers
from llm_trainer.training.memory import memory_monitor
from llm_trainer.training.memory.memory_monitor import MemoryMonitor

CPU = torch.device("cpu")


def emergencies(run: Path) -> list[str]:
    return [one.path.name for one in list_checkpoints(run) if one.path.name.startswith("emergency")]


def test_a_run_records_memory_load_and_where_its_time_goes(tmp_path: Path) -> None:
    tiny_run(tmp_path, eval_interval=2)
    lines = [line for line in read_metrics(tmp_path) if "loss" in line]
    last = lines[-1]
    assert 0.01 < last["system/rss_gb"] < 100
    assert 0 < last["system/memory_share"] < 1
    assert last["system/cpu_percent"] >= 0
    for what in ("forward", "backward", "optimizer", "data"):
        assert last[f"time/{what}"] > 0
    assert any("time/evaluation" in line for line in lines)
    assert any("time/saving" in line for line in lines)


def test_a_process_over_its_limit_logs_once_and_saves_once(tmp_path: Path) -> None:
    shown = io.StringIO()
    tiny_run(tmp_path, memory_limit_gb=0.01, save_interval=None, console=Console(file=shown, width=1000))
    text = shown.getvalue()
    assert text.count("memory is running short: memory ") == 1
    assert text.count("saving an emergency checkpoint") == 1
    assert emergencies(tmp_path) == ["emergency-1"]


def test_a_run_with_free_memory_saves_no_emergency_checkpoint(tmp_path: Path) -> None:
    tiny_run(tmp_path, memory_limit_gb=1000, save_interval=None)
    assert not emergencies(tmp_path)


def test_between_reports_memory_is_polled_when_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(memory_monitor, "time", SimpleNamespace(monotonic=lambda: now[0]))
    training = tiny_config(tmp_path, memory_limit_gb=0.01, memory_poll_seconds=10).training
    monitor = MemoryMonitor(training, CPU, lambda line: None)
    now[0] = 9.0
    assert not monitor.take_emergency()
    now[0] = 11.0
    assert monitor.take_emergency()
    now[0] = 22.0
    assert not monitor.take_emergency(), "it was answered"


GROWS = """
import torch
from llm_trainer.training.logging.system_stats import SystemStats

machine = SystemStats(torch.device("cpu"))
before = machine.sample().resident
held = torch.ones(25_000_000)
print((machine.sample().resident - before) / held.nbytes)
"""


@pytest.mark.slow
def test_resident_memory_follows_what_is_held() -> None:
    """In a process of its own: one that ran other tests may hold the room already, and then nothing grows."""
    done = subprocess.run(
        [sys.executable, "-c", GROWS], capture_output=True, text=True, check=True, timeout=120
    )
    assert float(done.stdout) == pytest.approx(1, rel=0.1)


def test_seconds_are_reported_per_step_and_as_fractions_of_the_total() -> None:
    timings = StepTimers(CPU)
    for _ in range(2):
        with timings.measure("forward"):
            time.sleep(0.02)
        timings.step_done()
    read = timings.read()
    assert set(read) == {"time/forward"}
    assert read["time/forward"] >= 0.02
    assert timings.read() == {}
    assert timings.describe() == "forward 100%"


def test_a_run_ends_with_a_line_of_where_its_time_went(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    trainer.train()
    assert "forward" in trainer.run.engine.timings.describe()
    assert "optimizer" in trainer.run.engine.timings.describe()
