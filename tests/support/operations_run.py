"""What one rank of a test does: one tiny run with a scaling schedule after another, in a process started
once.

Usage: torchrun … operations_run.py FOLDER, where FOLDER/runs.json is a list of {name, settings, model,
schedule}.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rank_process import train_each
from rich.console import Console
from tiny_run import tiny_config, tiny_model, tokens

from llm_trainer.config.resolve.parallelism import resolve_plan
from llm_trainer.config.schema.scaling_schedule import Operation
from llm_trainer.distributed.process_group import ProcessGroup
from llm_trainer.orchestration.orchestrator import Orchestrator
from llm_trainer.training.trainer import Trainer


def train(folder: Path, run: dict[str, Any], process_group: ProcessGroup) -> None:
    """One of the runs."""
    config = tiny_config(folder / run["name"], run["model"], **run["settings"])
    schedule = [Operation(**entry) for entry in run["schedule"]]
    plan = resolve_plan(config.training, process_group.world_size)
    quiet = Console(quiet=True)
    trainer = Trainer(
        tiny_model(config.model), config, tokens(), tokens(65, seed=1), console=quiet,
        process_group=replace(process_group, plan=plan),
        callbacks=[Orchestrator(schedule)],
    )  # fmt: skip
    trainer.train()


if __name__ == "__main__":
    train_each(train)
