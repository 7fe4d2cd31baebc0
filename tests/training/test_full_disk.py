"""A full disk: file and amount are named, no line is torn, and a save asks for no more than it needs."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launch import environment
from paths import SUPPORT
from tiny_run import tiny_run

from llm_trainer.errors import LLMTrainerError
from llm_trainer.training.logging.append_file import AppendFile
from llm_trainer.training.logging.metrics import MetricsTracker, read_metrics
from llm_trainer.training.logging.progress import ProgressReporter

WRITERS = ("metrics.jsonl", "events.out.tfevents", "train.log")


def fill_disk_at(monkeypatch: pytest.MonkeyPatch, name: str, after: int) -> None:
    """The disk is full when so many bytes more are written to the file of this name."""
    left, write = [after], os.write

    def limited(descriptor: int, data: bytes) -> int:
        if name not in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            return write(descriptor, data)
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = write(descriptor, data[: left[0]])
        left[0] -= count
        return count

    monkeypatch.setattr(os, "write", limited)


@pytest.mark.parametrize("name", WRITERS)
def test_a_record_is_written_completely_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tracker = MetricsTracker(tmp_path, ["tensorboard"])
    progress = ProgressReporter(10, log_folder=tmp_path)
    tracker.update({"loss": 1.0}, 1)
    progress.print_line("the first")
    (file,) = tmp_path.rglob(f"{name}*")
    before = file.read_bytes()
    fill_disk_at(monkeypatch, name, 7)
    if name == "train.log":
        write: Callable[[], None] = lambda: progress.print_line("the second")  # noqa: E731
    else:
        write = lambda: tracker.update({"loss": 2.0}, 2)  # noqa: E731
    with pytest.raises(LLMTrainerError, match=r"bytes were to be added, [\d,]+ are free") as full:
        write()
    assert str(file) in str(full.value)
    assert file.read_bytes() == before
    tracker.close()
    progress.close()


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int, data: bytes) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    file = AppendFile(tmp_path / "records")
    monkeypatch.setattr(os, "write", broken)
    with pytest.raises(LLMTrainerError, match="records could not be written: Input/output error"):
        file.write("line\n")


def on_a_small_disk(folder: Path, kilobytes: int, code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code with a file system of this size at `folder`/disk."""
    (folder / "disk").mkdir()
    script = f'mount -t tmpfs -o size={kilobytes}k none {folder}/disk && cd {SUPPORT} && "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, sys.executable, code],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no user namespaces here: {done.stderr.strip()}")
    return done


@pytest.mark.slow
def test_a_save_needs_no_more_than_it_writes(tmp_path: Path) -> None:
    """A disk with a fifth more space than the finished run takes is enough."""
    tiny_run(tmp_path / "straight")
    used = sum(path.stat().st_blocks * 512 for path in (tmp_path / "straight").rglob("*"))
    code = f"from pathlib import Path; from tiny_run import tiny_run; tiny_run(Path('{tmp_path}/disk/run'))"
    done = on_a_small_disk(tmp_path, int(used / 1000 * 1.2) + 64, code)
    assert done.returncode == 0, done.stderr


def test_metrics_on_a_disk_that_is_really_full(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from llm_trainer.training.logging.metrics import MetricsTracker, read_metrics
folder = Path('{tmp_path}/disk/run')
tracker = MetricsTracker(folder)
try:
    for step in range(10**6):
        tracker.update({{'loss': 1.5, 'learning_rate': 1e-3}}, step)
except Exception as error:
    print(error)
text = (folder / 'metrics.jsonl').read_text()
print(text.endswith('\\n'), len(read_metrics(folder)) == step)
"""
    done = on_a_small_disk(tmp_path, 64, code)
    message, facts = done.stdout.splitlines()
    assert message.startswith(f"no space left on the disk for {tmp_path}/disk/run/metrics.jsonl: ")
    assert facts == "True True"


def test_the_lines_before_a_full_disk_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_disk_at(monkeypatch, "metrics.jsonl", 1000)
    with pytest.raises(LLMTrainerError, match=r"metrics\.jsonl"):
        tiny_run(tmp_path)
    assert read_metrics(tmp_path)[0]["step"] == 1
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")
