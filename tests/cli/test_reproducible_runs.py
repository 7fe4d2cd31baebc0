"""The same command gives the same weights, bit for bit: again, and next to busy processes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

RUN = [
    "--n_layer=2", "--n_head=2", "--n_embd=128", "--block_size=64", "--batch_size=4", "--max_iters=12",
    "--gradient_accumulation_steps=2", "--eval_interval=6", "--eval_iters=2", "--dropout=0.1",
    "--warmup_iters=2", "--save_interval=6",
]  # fmt: skip


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Processes that want a core each, for as long as the block lasts."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def weights_of(folder: Path) -> str:
    """Hash of the final weights."""
    return hashlib.sha256((folder / "final_model" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
def test_three_equal_runs_are_bit_equal_though_one_is_next_to_busy_processes(place: Path) -> None:
    """With every choice left to `auto`: precision, compilation, threads."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}

    def train(out: str) -> str:
        command = [sys.executable, str(ROOT / "train_refactored.py"), "--data_dir=data/prepared/text", *RUN]
        subprocess.run(
            [*command, f"--out_dir={out}"], check=True, env=environment, cwd=place, capture_output=True
        )
        return weights_of(place / out)

    first, second = train("first"), train("second")
    with busy_processes(2):
        third = train("third")
    assert first == second == third


@pytest.mark.slow
def test_a_run_that_is_resumed_next_to_busy_processes_ends_as_the_straight_one(place: Path) -> None:
    """What `auto` chose is stored, and would be chosen again."""

    def train(*arguments: str) -> None:
        command = [sys.executable, str(ROOT / "train_refactored.py"), "--data_dir=data/prepared/text", *RUN]
        subprocess.run([*command, *arguments], check=True, cwd=place, capture_output=True)

    train("--out_dir=straight")
    straight = place / "straight" / "checkpoint-6"
    with busy_processes(2):
        train("--out_dir=resumed", f"--resume={straight}")
    assert weights_of(place / "straight") == weights_of(place / "resumed")
