"""Trains a run again and again, each time killed at another system call of its saves, resumes it, and says
where it ended.

Run as a script: `killed_runs.py FOLDER on|off` (whether saves are written in the background). Forks and
strace as in save_under_strace.py. What is killed: all that the run writes from its sixth step on: best model,
checkpoint, rotation, final model. Prints one JSON object a trial: what differs, at the end, from the run that
was never interrupted.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from save_under_strace import OneAfterAnother, calls_of, trial
from tiny_run import tiny_run, tiny_trainer

from llm_trainer.diagnostics.verify_resume import StopAtStep, compare_checkpoints
from llm_trainer.training.callbacks.callback import Callback
from llm_trainer.training.checkpoint import store as checkpoints
from llm_trainer.training.run import TrainingRun

SETTINGS = {
    "max_steps": 8,
    "eval_interval": 6,
    "save_total_limit": 1,
    "logging_steps": 100,
    "file_logging": False,
}


class WaitsForTracer(Callback):
    """Stops the process before the saves of a step, until somebody lets it go on."""

    def on_step_end(self, run: TrainingRun, step: int) -> None:
        if step == 6:
            os.kill(os.getpid(), signal.SIGSTOP)


def train(run_folder: Path, how: str, *callbacks: Callback) -> None:
    """Go on with the run until its end."""
    tiny_trainer(
        run_folder, resume_from=str(run_folder), callbacks=callbacks, asynchronous_saves=how, **SETTINGS
    ).train()  # type: ignore[arg-type]


def trials(folder: Path, how: str) -> Iterator[dict[str, object]]:
    """Every call of every kind, one at a time."""
    folder.mkdir(parents=True)
    template, run_folder, straight = folder / "template", folder / "run", folder / "straight"
    tiny_run(straight, **SETTINGS)
    tiny_run(template, callbacks=[StopAtStep(3)], **SETTINGS)

    def run_on() -> None:
        train(run_folder, how, WaitsForTracer())

    for call, count in calls_of(run_on, template, run_folder, folder / "log").items():
        for number in range(1, count + 1):
            options = [
                "-e",
                f"trace={call}",
                "-e",
                f"inject={call}:signal=SIGKILL:when={number}",
                "-o",
                os.devnull,
            ]
            status = trial(run_on, template, run_folder, options)
            left = sorted(
                path.name
                for path in run_folder.iterdir()
                if path.name.startswith((".", "checkpoint", "best", "final"))
            )
            train(run_folder, how)
            differences = compare_checkpoints(straight / "final_model", run_folder / "final_model")
            yield {
                "call": call,
                "number": number,
                "status": os.waitstatus_to_exitcode(status),
                "left": left,
                "differences": differences,
            }


if __name__ == "__main__":
    checkpoints.ThreadPoolExecutor = OneAfterAnother  # type: ignore[assignment, misc]
    torch.set_num_threads(1)  # a fork keeps no other threads
    gc.freeze()  # nor need it look for garbage among what imports have made
    for line in trials(Path(sys.argv[1]), sys.argv[2]):
        print(json.dumps(line), flush=True)
