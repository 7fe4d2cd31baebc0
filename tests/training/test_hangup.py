"""A closed terminal stops a run as SIGTERM does: the step is finished and a checkpoint is saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from launch import environment

from llm_trainer.run_dir import resolve_resume_folder
from llm_trainer.training.preemption import EXIT_PREEMPTED, StopSignals

# A run that prints, waits at step 4 until its file `go` exists, and prints more.
RUN = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from rich.console import Console
    from llm_trainer.cli.errors import run_with_error_handling
    from llm_trainer.training.callbacks.callback import Callback
    from tiny_run import tiny_trainer

    folder = Path(sys.argv[1])

    class Pause(Callback):
        def on_step_end(self, run, step):
            if step == 4:
                run.log("here")
                while not (folder / "go").exists():
                    time.sleep(0.01)
                for _ in range(3):
                    run.log("more")

    def train():
        result = tiny_trainer(folder, callbacks=[Pause()], console=Console()).train()
        print("the end", flush=True)
        return result.exit_code

    sys.exit(run_with_error_handling(train))
""")


def start(folder: Path, output: int, *, is_terminal: bool) -> subprocess.Popen[bytes]:
    """The run, with this output, which may be the terminal of its own session."""

    def before() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup make test` has it ignored
        if is_terminal:
            os.login_tty(output)

    return subprocess.Popen(
        [sys.executable, "-c", RUN, folder],
        env=environment(),
        stdout=output,
        stderr=output,
        preexec_fn=before,
    )


def read_until_here(reader: int) -> None:
    text = b""
    while b"here" not in text:
        text += os.read(reader, 1000)


def assert_saved(process: subprocess.Popen[bytes], folder: Path) -> None:
    assert process.wait(timeout=60) == EXIT_PREEMPTED
    assert resolve_resume_folder(folder).name == "emergency-4"
    assert "here" in (folder / "logs" / "train.log").read_text(encoding="utf-8")


def test_a_run_whose_terminal_is_closed_saves_and_ends(tmp_path: Path) -> None:
    terminal, slave = os.openpty()
    process = start(tmp_path, slave, is_terminal=True)
    os.close(slave)
    read_until_here(terminal)
    os.close(terminal)
    (tmp_path / "go").touch()
    assert_saved(process, tmp_path)


@pytest.mark.slow
def test_a_run_whose_tee_got_the_hangup_too_saves_and_ends(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    process = start(tmp_path, writer, is_terminal=False)
    os.close(writer)
    read_until_here(reader)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGHUP)  # the shell's, after the kernel's
    os.close(reader)
    (tmp_path / "go").touch()
    assert_saved(process, tmp_path)


@pytest.fixture
def _default_hangup() -> object:
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("_default_hangup")
def test_whoever_ignores_hangups_continues_to() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not signals.stop_requested
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_sigterm_after_a_hangup_still_lets_the_step_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_trainer.training.preemption._discard_lost_output", lambda: None)
    exits: list[int] = []
    monkeypatch.setattr("llm_trainer.training.preemption.os._exit", exits.append)
    with StopSignals() as signals:
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
        assert (signals.received, exits) == (signal.SIGTERM, [])
        assert signals.exit_code == EXIT_PREEMPTED
        os.kill(os.getpid(), signal.SIGTERM)
        assert exits == [128 + signal.SIGTERM]
