"""A run folder belongs to one process at a time, as long as that lives; verify-resume writes elsewhere."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import fork_server
import pytest
from fork_server import ForkedProcess
from launch import train_on_ranks
from paths import SUPPORT
from tiny_run import tiny_run, tiny_trainer

from llm_trainer.config import CheckpointError
from llm_trainer.diagnostics.verify_resume import verify_resume
from llm_trainer.training.callbacks.callback import Callback
from llm_trainer.training.run import TrainingRun
from llm_trainer.training.run_lock import RunLock, check_not_locked
from llm_trainer.training.trainer import Trainer

# A run that waits at step 4 for a line on stdin.
LIVE = textwrap.dedent("""
    import sys
    from pathlib import Path
    from llm_trainer.training.callbacks.callback import Callback
    from tiny_run import tiny_trainer

    class Pause(Callback):
        def on_step_end(self, run, step):
            if step == 4:
                print("here", flush=True)
                sys.stdin.readline()

    sys.exit(tiny_trainer(Path(sys.argv[1]), callbacks=[Pause()]).train().exit_code)
""")


def live_run(folder: Path) -> ForkedProcess:
    """A process that trains in the folder and waits at step 4."""
    command = ["-c", LIVE, folder]
    process = fork_server.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=SUPPORT)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    return process


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("resume_from", [None, "auto"])
def test_a_second_start_in_a_live_runs_folder_is_refused_and_changes_nothing(
    tmp_path: Path, resume_from: str | None
) -> None:
    process = live_run(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=str(process.pid)) as refused:
        tiny_run(tmp_path, resume_from=resume_from)
    assert socket.gethostname() in str(refused.value)
    assert str(tmp_path) in str(refused.value)
    assert contents(tmp_path) == before
    process.communicate("\n")
    assert process.returncode == 0
    tiny_run(tmp_path, resume_from=resume_from)  # the folder is free again


def test_a_killed_run_does_not_block_its_folder(tmp_path: Path) -> None:
    process = live_run(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "run.lock").exists()
    assert tiny_run(tmp_path, resume_from="auto").step == 10


def test_a_child_that_outlives_its_parent_does_not_keep_the_lock(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import os, sys, time
        from pathlib import Path
        from llm_trainer.training.run_lock import RunLock
        lock = RunLock(Path(sys.argv[1]))
        child = os.fork()
        if child == 0:
            os.close(1)
            time.sleep(60)
            os._exit(0)
        print(child, flush=True)
        os._exit(0)
    """)
    done = subprocess.run([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, check=True)
    try:
        RunLock(tmp_path).release()
    finally:
        os.kill(int(done.stdout), signal.SIGKILL)


@pytest.mark.slow
def test_a_process_may_lock_a_folder_several_times(tmp_path: Path) -> None:
    def is_free() -> bool:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(_is_free, (tmp_path,))

    first, second = RunLock(tmp_path), RunLock(tmp_path / "." / "")
    first.release()
    first.release()
    assert not is_free()
    second.release()
    assert is_free()


def _is_free(folder: Path) -> bool:
    try:
        check_not_locked(folder)
    except CheckpointError:
        return False
    return True


def test_the_folder_is_free_after_a_run_that_failed(tmp_path: Path) -> None:
    class Fail(Callback):
        def on_train_start(self, run: TrainingRun) -> None:
            raise KeyError("a defect")

    with pytest.raises(KeyError):
        tiny_run(tmp_path, callbacks=[Fail()])
    process = live_run(tmp_path)
    process.communicate("\n")
    assert process.returncode == 0


def test_a_file_system_without_locks_is_reported_and_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    tiny_trainer(tmp_path, console=Console()).train()
    assert f"{tmp_path} cannot be locked (Operation not supported)" in capsys.readouterr().out


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"[]", b'{"pid": "x"}', json.dumps([0] * 9999).encode()])
def test_a_lock_file_of_any_content_is_read(tmp_path: Path, text: bytes) -> None:
    script = textwrap.dedent("""
        import fcntl, sys
        file = open(sys.argv[1], "rb")
        fcntl.flock(file, fcntl.LOCK_EX)
        print("held", flush=True)
        sys.stdin.read()
    """)
    (tmp_path / "run.lock").write_bytes(text)
    command = [sys.executable, "-c", script, tmp_path / "run.lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(CheckpointError, match="in use by another process"):
            RunLock(tmp_path)
    RunLock(tmp_path).release()


def test_verify_resume_beside_a_live_run_leaves_the_folder_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = live_run(folder)  # has saved checkpoint-3
    before = contents(folder)
    report = verify_resume(folder, 3, builder)
    assert report.exact, str(report)
    assert (report.first_step, report.last_step) == (0, 3)
    assert len(report.comparisons) == 2
    assert contents(folder) == before
    process.communicate("\n")
    assert process.returncode == 0


def test_verify_resume_does_not_need_checkpoints_that_the_run_removes_meanwhile(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    tiny_run(folder)

    def build(start: Path | None, into: Path, callbacks: Sequence[Callback]) -> Trainer:
        shutil.rmtree(folder, ignore_errors=True)
        return builder(start, into, callbacks)

    report = verify_resume(folder, 4, build)
    assert report.exact, str(report)
    assert len(report.comparisons) == 2


def builder(start: Path | None, into: Path, callbacks: Sequence[Callback]) -> Trainer:
    return tiny_trainer(into, resume_from=str(start) if start else None, callbacks=callbacks)


def test_all_ranks_of_a_second_start_are_refused(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run"):
        run = {"name": "run", "settings": {"max_steps": 2}, "model": {}}
        done = train_on_ranks(2, "ranked_run", tmp_path, [run])
    assert done.returncode != 0
    assert f"is in use by process {os.getpid()}" in done.stdout + done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"]
