"""What one rank of a test does: one tiny run with a scaling schedule after another, in a process started
once.

Usage: torchrun … operations_run.py FOLDER, where FOLDER/runs.json is a list of {name, settings, model,
schedule}.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from tiny_run import tiny_config, tiny_model, tokens

from llm_trainer.config import TrainingConfig
from llm_trainer.config.environment import launch_environment
from llm_trainer.config.resolve.parallelism import resolve_plan
from llm_trainer.config.schema.scaling_schedule import Operation
from llm_trainer.distributed.process_group import Ranks, end_process, joined
from llm_trainer.orchestration.orchestrator import Orchestrator
from llm_trainer.training.trainer import Trainer


def train(folder: Path, run: dict[str, Any], ranks: Ranks) -> None:
    """One of the runs."""
    config = tiny_config(folder / run["name"], run["model"], **run["settings"])
    schedule = [Operation(**entry) for entry in run["schedule"]]
    plan = resolve_plan(config.training, ranks.count)
    quiet = Console(quiet=True)
    trainer = Trainer(
        tiny_model(config.model), config, tokens(), tokens(65, seed=1), console=quiet, ranks=replace(ranks, plan=plan),
        callbacks=[Orchestrator(schedule)],
    )  # fmt: skip
    trainer.train()


def main(folder: Path) -> None:
    """Every run of the list, over the ranks that were launched."""
    with joined(launch_environment(), TrainingConfig(device="cpu")) as ranks:
        for run in json.loads((folder / "runs.json").read_text(encoding="utf-8")):
            train(folder, run, ranks)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_process(0)
