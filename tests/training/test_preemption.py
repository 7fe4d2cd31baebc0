"""After a signal the step is finished, a checkpoint is saved, the exit code tells why, and the resumed run
equals the uninterrupted one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import textwrap
import time
from pathlib import Path

import fork_server
import pytest
from fork_server import ForkedProcess
from paths import SUPPORT
from tiny_run import tiny_run

from llm_trainer.diagnostics.verify_resume import compare_checkpoints
from llm_trainer.run_dir import resolve_resume_folder
from llm_trainer.training.preemption import EXIT_INTERRUPTED, EXIT_PREEMPTED, StopSignals

# Prints when the run is at a point and waits there for a line on stdin, so that the signal comes then.
SCRIPT = textwrap.dedent("""
    import sys
    from pathlib import Path
    from llm_trainer.training.callbacks.callback import Callback
    from tiny_run import tiny_trainer

    folder, place = Path(sys.argv[1]), sys.argv[2]

    def wait():
        print("here", flush=True)
        sys.stdin.readline()

    class Pause(Callback):
        def on_step_end(self, trainer, step):
            if place == "step" and step == 4: wait()
        def on_validation(self, trainer, result):
            if place == "validation" and trainer.current_step == 4: wait()

    trainer = tiny_trainer(folder, callbacks=[Pause()])
    save = trainer.run.store.save
    def slow_save(*args):
        if place == "save" and args[1] == 3: wait()
        return save(*args)
    trainer.run.store.save = slow_save
    sys.exit(trainer.train().exit_code)
""")


def start(folder: Path, place: str) -> ForkedProcess:
    """The run, waiting at `place`."""
    command = ["-c", SCRIPT, folder, place]
    process = fork_server.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=SUPPORT)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    return process


@pytest.mark.parametrize(
    ("place", "number", "status"),
    [
        ("step", signal.SIGTERM, EXIT_PREEMPTED),
        ("save", signal.SIGUSR1, EXIT_PREEMPTED),
        ("validation", signal.SIGTERM, EXIT_PREEMPTED),
        ("step", signal.SIGINT, EXIT_INTERRUPTED),
    ],
)
def test_a_signal_saves_after_the_step_and_the_resumed_run_equals_the_uninterrupted_one(
    tmp_path: Path, place: str, number: signal.Signals, status: int
) -> None:
    process = start(tmp_path / "cut", place)
    process.send_signal(number)
    process.communicate("\n")
    assert process.returncode == status
    assert resolve_resume_folder(tmp_path / "cut").name.startswith("emergency-")
    tiny_run(tmp_path / "cut", resume_from=str(tmp_path / "cut"))
    tiny_run(tmp_path / "straight")
    assert compare_checkpoints(tmp_path / "cut" / "final_model", tmp_path / "straight" / "final_model") == []


def test_a_second_signal_exits_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, "step")
    process.send_signal(signal.SIGTERM)
    while process.poll() is None:  # the first may not be handled yet, and two of a kind would be merged
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert process.returncode == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("emergency-*"))


def test_the_exit_code_for_preemption_is_neither_success_nor_an_error() -> None:
    assert EXIT_PREEMPTED not in (0, 1, 2)


def test_signal_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.stop_requested
        assert signals.exit_code == EXIT_PREEMPTED
    assert signal.getsignal(signal.SIGTERM) == before


def test_without_a_signal_no_stop_is_requested() -> None:
    with StopSignals() as signals:
        assert not signals.stop_requested
        assert signals.exit_code == 0
