"""Saves a checkpoint again and again, each time with one system call of the save killed or failing, and says
what was left.

Run as a script: `save_under_strace.py RUN_FOLDER kill|full on|off` (on: the save is written in the
background). One process imports torch and prepares the snapshot; each trial is a fork of it that strace
attaches to, so that a trial costs tenths of a second. strace counts each kind of system call by itself, and
in each thread, so every call of every kind gets its turn. Prints one JSON object a trial.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import cast

import torch
from snapshots import snapshot

from llm_trainer.config import CheckpointError
from llm_trainer.run_dir import list_checkpoints, resolve_model_folder, resolve_resume_folder, verify
from llm_trainer.training.checkpoint import store as checkpoints
from llm_trainer.training.checkpoint.store import Asynchronous, CheckpointData, CheckpointStore

CALLS = (
    "openat",
    "write",
    "pwrite64",
    "writev",
    "fsync",
    "rename",
    "mkdir",
    "unlinkat",
    "rmdir",
    "ftruncate",
    "copy_file_range",
)
PR_SET_PTRACER, ANYBODY = 0x59616D61, -1
REFUSED = 3


class OneAfterAnother:
    """Runs at once what is submitted: strace counts calls per thread, and each call should have its turn."""

    def __init__(self, _: int) -> None: ...

    def __enter__(self) -> OneAfterAnother:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, work: Callable[[Path], None], path: Path) -> Future[None]:
        done: Future[None] = Future()
        done.set_result(work(path))
        return done


def save_twice(run_folder: Path, taken: CheckpointData, how: Asynchronous) -> None:
    """What is under test: replace the best model, write a checkpoint, rotate an older one away."""
    store = CheckpointStore(run_folder, save_total_limit=1, asynchronous=how)
    store.save_best(taken)
    store.save(taken, 2)
    store.wait()


def forked(work: Callable[[], None]) -> int:
    """A child that works, and stops itself where it wants to be traced from; its id."""
    child = os.fork()
    if child:
        os.waitpid(child, os.WUNTRACED)
        return child
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANYBODY, 0, 0, 0)
    try:
        work()
    except CheckpointError as error:
        with contextlib.suppress(OSError):  # it may be this call's turn to be refused
            os.write(2, f"{error}\n".encode())
        os._exit(REFUSED)
    os._exit(0)


def trial(work: Callable[[], None], template: Path, run_folder: Path, options: list[str]) -> int:
    """Work in a fresh copy of the template under strace with these options; the child's wait status."""
    shutil.rmtree(run_folder, ignore_errors=True)
    shutil.copytree(template, run_folder)
    child = forked(work)
    tracer = subprocess.Popen(
        ["strace", "-f", "-qq", "-p", str(child), *options], stderr=subprocess.PIPE, text=True
    )
    while f"TracerPid:\t{tracer.pid}" not in Path(f"/proc/{child}/status").read_text(encoding="utf-8"):
        if tracer.poll() is not None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise SystemExit(f"strace cannot attach: {tracer.communicate()[1]}")
        time.sleep(0.001)
    os.kill(child, signal.SIGCONT)
    _, status = os.waitpid(child, 0)
    tracer.wait()
    return status


def calls_of(work: Callable[[], None], template: Path, run_folder: Path, log: Path) -> dict[str, int]:
    """How often each kind of system call is made, at most, in one thread."""
    assert trial(work, template, run_folder, ["-e", f"trace={','.join(CALLS)}", "-o", str(log)]) == 0
    made = collections.Counter(
        re.findall(r"^(\d+) +(\w+)\(", log.read_text(encoding="utf-8", errors="replace"), flags=re.M)
    )
    return {
        call: max(count for (_, one), count in made.items() if one == call)
        for call in {call for _, call in made}
    }


def trials(run_folder: Path, fault: str, how: Asynchronous) -> Iterator[dict[str, object]]:
    """Every call of every kind, one at a time."""
    template, log = run_folder.with_name("template"), run_folder.with_name("log")
    before, after = (
        snapshot(run_folder, seed=1, state={"step": 1}),
        snapshot(run_folder, seed=2, state={"step": 2}),
    )
    store = CheckpointStore(template)
    store.save_best(before)
    store.save(before, 1)

    def work() -> None:
        os.kill(os.getpid(), signal.SIGSTOP)
        save_twice(run_folder, after, how)

    for call, count in calls_of(work, template, run_folder, log).items():
        for number in range(1, count + 1):
            what = "signal=SIGKILL" if fault == "kill" else "error=ENOSPC"
            options = ["-e", f"trace={call}", "-e", f"inject={call}:{what}:when={number}", "-o", os.devnull]
            status = trial(work, template, run_folder, options)
            yield {
                "call": call,
                "number": number,
                "status": os.waitstatus_to_exitcode(status),
                **what_is_left(run_folder, after),
            }


def what_is_left(run_folder: Path, taken: CheckpointData) -> dict[str, object]:
    """What a person would find, and whether the next save puts the folder in order."""
    resumed, model = (
        resolve_resume_folder(run_folder, lambda _: None),
        resolve_model_folder(run_folder, lambda _: None),
    )
    left = {
        "resumable": hash_of_tensors(resumed),
        "best": hash_of_tensors(model) if "best_model" in model.name and not verify(model) else "damaged",
        "damaged": [one.path.name for one in list_checkpoints(run_folder) if verify(one.path)],
        "litter": sorted(path.name for path in run_folder.iterdir() if path.name.startswith(".")),
    }
    CheckpointStore(run_folder, save_total_limit=1).save(taken, 3)
    return {**left, "after_next_save": sorted(path.name for path in run_folder.iterdir())}


def hash_of_tensors(folder: Path) -> str:
    """The hashes of weights and optimizer that the manifest has, which `verify` holds the files to."""
    files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    return " ".join(files[name]["sha256"][:8] for name in sorted(files) if name.endswith(".safetensors"))


if __name__ == "__main__":
    checkpoints.ThreadPoolExecutor = OneAfterAnother  # type: ignore[assignment, misc]
    torch.set_num_threads(1)  # a fork keeps no other threads
    gc.freeze()  # nor need it look for garbage among what imports have made
    for line in trials(Path(sys.argv[1]), sys.argv[2], cast("Asynchronous", sys.argv[3])):
        print(json.dumps(line), flush=True)
