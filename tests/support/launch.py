"""Runs the scripts that train on several ranks (`ranked_run.py` and others) under torchrun.

Each script trains every run of `FOLDER/runs.json`, one after another, in one process per rank.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fork_server
from paths import ROOT, SUPPORT


def train_on_ranks(
    count: int, script: str, folder: Path, runs: Sequence[Mapping[str, Any]], *flags: str
) -> subprocess.CompletedProcess[str]:
    """Trains the runs on `count` ranks and returns what became of torchrun.

    This is torchrun's own code with its rendezvous, environment and agent, but the launcher and the ranks are
    forks of a process that has imported PyTorch (`--run-path --start-method=fork`), which saves several
    seconds per rank. Tests of ranks that die or are started again use `torchrun_command`.

    Args:
        count: The number of ranks.
        script: The script's name without `.py`.
        folder: Where the list of runs and the run folders go.
        runs: The runs, as the script reads them.
        flags: Further flags of torchrun.
    """
    write_runs(folder, runs)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", *flags]
    torchrun += ["--run-path", "--start-method=fork"]
    arguments = [*torchrun, str(SUPPORT / f"{script}.py"), str(folder)]
    return fork_server.run(arguments, env=environment(), timeout=400, imports=[script])


def torchrun_command(count: int, script: str, folder: Path, *flags: str) -> list[str]:
    """The command line that trains the runs of `folder` in fresh processes, as a user would start them."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    return [*torchrun, *flags, str(SUPPORT / f"{script}.py"), str(folder)]


def write_runs(folder: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """Writes the list of runs that a script reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runs.json").write_text(json.dumps(runs), encoding="utf-8")


def environment() -> dict[str, str]:
    """This environment, with one thread per rank and the package and the scripts on the path."""
    paths = [str(ROOT), str(SUPPORT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
