"""A rank that dies or hangs ends the run on all of them within ten seconds, by name, and leaves nothing
running.
"""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from launch import environment, torchrun_command, write_runs


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A long run on two ranks under torchrun, past its first steps."""
    settings = {"max_steps": 1_000_000, "save_interval": None, "eval_interval": 1_000_000, "warmup_steps": 1}
    write_runs(tmp_path, [{"name": "run", "model": {}, "settings": settings}])
    command = torchrun_command(2, "ranked_run", tmp_path)
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        metrics = tmp_path / "run/metrics.jsonl"
        end = time.monotonic() + 60
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(2)  # both have heard of each other
        yield process, tmp_path
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            child.kill()
        process.kill()


def ranks_of(launcher: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    return {
        int(child.environ()["RANK"]): child
        for child in psutil.Process(launcher.pid).children()
        if "RANK" in child.environ()
    }


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_rank_ends_the_run_by_name(
    launched: tuple[subprocess.Popen[str], Path], number: signal.Signals, victim: int
) -> None:
    launcher, _ = launched
    ranks = ranks_of(launcher)
    assert sorted(ranks) == [0, 1]
    ranks[victim].send_signal(number)
    start = time.monotonic()
    psutil.wait_procs([ranks[1 - victim]], timeout=30)
    seconds = time.monotonic() - start
    if number == signal.SIGSTOP:
        ranks[victim].send_signal(
            signal.SIGCONT
        )  # the launcher's own SIGTERM reaches it then; it would kill it after 30 s
    said, _ = launcher.communicate(timeout=60)
    assert seconds <= 10, said
    assert launcher.returncode != 0
    assert re.search(rf"rank\s+(: )?{victim}\b", said), (
        said
    )  # torchrun's words for a killed rank, ours for a silent one
    assert not [one for one in ranks.values() if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_once_on_all_ranks(
    launched: tuple[subprocess.Popen[str], Path],
) -> None:
    launcher, folder = launched
    ranks = ranks_of(launcher)
    launcher.send_signal(signal.SIGTERM)
    said, _ = launcher.communicate(timeout=60)
    assert len(list((folder / "run").glob("emergency-*"))) == 1, said
    assert not [one for one in ranks.values() if one.is_running()]
