"""What the scripts that train on several ranks have in common: each of their processes is one rank."""

from __future__ import annotations

import gc
import json
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_trainer.config import TrainingConfig
from llm_trainer.config.environment import launch_environment
from llm_trainer.distributed.process_group import ProcessGroup, exit_process, init_process_group


def train_each(train: Callable[[Path, dict[str, Any], ProcessGroup], None]) -> None:
    """Calls `train(folder, run, process_group)` for every run of `runs.json` in the folder that the command
    line names, on all ranks that were launched, and ends the process.
    """
    gc.freeze()  # runs that change the model look for garbage often; imports have made none
    folder = Path(sys.argv[1])
    with init_process_group(launch_environment(), TrainingConfig(device="cpu")) as process_group:
        for run in json.loads((folder / "runs.json").read_text(encoding="utf-8")):
            train(folder, run, process_group)
    if multiprocessing.parent_process() is None:  # torchrun waits for a forked rank to return
        exit_process(0)
