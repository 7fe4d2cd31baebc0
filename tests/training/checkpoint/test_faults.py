"""Faults injected into a save: killed at each system call, refused by a full disk, damaged afterwards."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import fork_server
import pytest
import torch
from paths import SUPPORT
from rich.console import Console
from tiny_run import tiny_run

from llm_trainer.config import CheckpointError
from llm_trainer.diagnostics.verify_resume import StopAtStep, compare_checkpoints
from llm_trainer.inference.load_model import load_transformer
from llm_trainer.run_dir import list_checkpoints, write_manifest

KILLED, SAVED, REFUSED = -9, 0, 3

needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None, reason="needs strace (apt-get install strace)"
)


def trials_of(script: str, *arguments: str | Path) -> list[dict[str, object]]:
    """What a script prints, line by line."""
    done = fork_server.run([SUPPORT / script, *arguments], timeout=1000)
    if "strace cannot attach" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def values(trials: Sequence[dict[str, object]], key: str) -> set[str]:
    """The different values of an entry."""
    return {str(trial[key]) for trial in trials}


in_the_background = pytest.mark.parametrize("how", ["off", "on"], ids=["at once", "in the background"])


@pytest.mark.slow
@needs_strace
@in_the_background
def test_killed_at_any_system_call_of_a_save_complete_checkpoints_are_left(tmp_path: Path, how: str) -> None:
    trials = trials_of("save_under_strace.py", tmp_path / "run", "kill", how)
    assert len(trials) > 100
    assert {trial["status"] for trial in trials} == {KILLED}
    assert values(trials, "damaged") == {"[]"}  # nothing half-written ever bears a checkpoint's name
    assert (
        len(values(trials, "resumable")) == len(values(trials, "best")) == 2
    )  # the earlier one or the new one, each bit-exact
    assert values(trials, "after_next_save") == {"['best_model', 'checkpoint-3']"}


@pytest.mark.slow
@needs_strace
@in_the_background
def test_killed_at_any_system_call_of_its_saves_a_run_resumes_to_the_weights_it_would_have_had(
    tmp_path: Path, how: str
) -> None:
    trials = trials_of("killed_runs.py", tmp_path / "runs", how)
    assert len(trials) > 100
    assert {trial["status"] for trial in trials} == {KILLED}
    assert len(values(trials, "left")) > 5  # it was killed at different points
    assert values(trials, "differences") == {"[]"}


@pytest.mark.slow
@needs_strace
@in_the_background
def test_a_full_disk_at_any_system_call_leaves_earlier_checkpoints_and_no_leftovers(
    tmp_path: Path, how: str
) -> None:
    trials = trials_of("save_under_strace.py", tmp_path / "run", "full", how)
    refused = [trial for trial in trials if trial["status"] == REFUSED]
    assert {trial["status"] for trial in trials} <= {REFUSED, SAVED}
    assert {trial["call"] for trial in refused} >= {"write", "openat", "mkdir", "fsync", "rename"}
    assert values(trials, "damaged") == {"[]"}
    assert values(refused, "litter") == {"[]"}
    assert len(values(trials, "best")) == 2
    assert "damaged" not in values(trials, "best")


def test_a_run_whose_newest_checkpoint_is_damaged_resumes_from_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_run(tmp_path / "straight")
    tiny_run(tmp_path / "cut", callbacks=[StopAtStep(7)], eval_interval=100)
    shutil.rmtree(tmp_path / "cut" / "final_model")
    weights = tmp_path / "cut" / "checkpoint-6" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    output = io.StringIO()
    tiny_run(
        tmp_path / "cut",
        resume_from=str(tmp_path / "cut"),
        save_interval=100,
        console=Console(file=output, width=1000),
    )
    lines = output.getvalue().splitlines()
    assert any("skipping" in line and "checkpoint-6" in line and "bytes instead of" in line for line in lines)
    straight, resumed = tmp_path / "straight" / "final_model", tmp_path / "cut" / "final_model"
    assert [
        line
        for line in compare_checkpoints(straight, resumed)
        if not line.startswith("state best_validation_loss")
    ] == []


class Hostile:
    """What runs when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self.canary), "w"))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer/model-00001-of-00001.safetensors"])
def test_nothing_in_a_checkpoint_is_unpickled_even_if_its_manifest_agrees(tmp_path: Path, name: str) -> None:
    tiny_run(tmp_path / "run", callbacks=[StopAtStep(4)])
    folder, canary = tmp_path / "run/final_model", tmp_path / "canary"
    (folder / name).write_bytes(pickle.dumps(Hostile(canary)))
    write_manifest(folder)
    with pytest.raises(CheckpointError, match="damaged"):
        tiny_run(tmp_path / "run", resume_from=str(folder))
    assert not canary.exists()


def test_a_pickle_that_is_named_to_be_resumed_is_not_opened(tmp_path: Path) -> None:
    file, canary = tmp_path / "checkpoint.pt", tmp_path / "canary"
    file.write_bytes(pickle.dumps(Hostile(canary)))
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        tiny_run(tmp_path / "run", resume_from=str(file))
    assert not canary.exists()


def test_a_nanogpt_file_that_holds_code_is_refused_unexecuted(tmp_path: Path) -> None:
    file, canary = tmp_path / "ckpt.pt", tmp_path / "canary"
    torch.save({"model": Hostile(canary), "model_args": {}}, file)
    with pytest.raises(CheckpointError, match=r"ckpt\.pt"):
        load_transformer(file)
    assert not canary.exists()


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_run_with_a_message_and_leaves_no_partial_checkpoint(
    tmp_path: Path,
) -> None:
    """A real full disk: a tmpfs of 4 MB in a user namespace, where the check of free space is what
    refuses.
    """
    script = (
        f"mount -t tmpfs -o size=9m none {tmp_path} && dd if=/dev/zero of={tmp_path}/ballast bs=1k "
        f"count=9090 status=none && cd {SUPPORT} && {sys.executable} -c "
        f'"from pathlib import Path; from tiny_run import tiny_run; '
        f"tiny_run(Path('{tmp_path}'), eval_interval=100)\"; "
        f"echo status $?; ls -A {tmp_path}"
    )
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no user namespaces here: {done.stderr.strip()}")
    assert "CheckpointError" in done.stderr
    assert "MB are missing" in done.stderr
    assert "status 1" in done.stdout
    assert ".tmp-" not in done.stdout
    assert list_checkpoints(tmp_path) == []
