"""What one rank of a test does: one tiny run after another, in a process started once, since imports are most
of its time.

Usage: torchrun … ranked_run.py FOLDER, where FOLDER/runs.json is a list of {name, settings, model}; each run goes to FOLDER/<name>.
`document_every`: the data are documents of so many tokens.
`poisoned_step`: the last rank's loss is not a number there, or `poison` times what it was, once; `dies_at`: the last rank kills itself
there, at the launcher's first attempt.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tiny_run import tiny_config, tiny_model, tokens

from llm_trainer.config.environment import launch_environment
from llm_trainer.distributed.process_group import Ranks, end_process, joined
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.callbacks import Callback
from llm_trainer.training.objectives.objective import LossSum, NextToken
from llm_trainer.training.trainer import Trainer


def train(folder: Path, run: dict[str, Any], ranks: Ranks) -> None:
    """One of the runs."""
    config = tiny_config(folder / str(run["name"]), run["model"], **run["settings"])
    model = tiny_model(config.model)
    every = run.get("document_every")
    data = tokens(document_every=every), tokens(65, seed=1, document_every=every)
    trainer = Trainer(model, config, *data, console=Console(quiet=True), ranks=ranks)
    is_last = ranks.rank == ranks.count - 1
    if is_last and "poisoned_step" in run:
        trainer.engine.objective = Poisoned(
            int(str(run["poisoned_step"])), trainer, float(run.get("poison", "nan"))
        )
    if is_last and "dies_at" in run and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
        trainer.callbacks.append(DiesAt(int(str(run["dies_at"]))))
    trainer.train()


class Poisoned(NextToken):
    """Not a number, or far off, at one step."""

    def __init__(self, step: int, trainer: Trainer, factor: float) -> None:
        super().__init__()
        self.step, self.trainer, self.factor = step, trainer, factor
        self.seen_at, self.has_gone_back = -1, False

    def of_hidden(self, model: Transformer, hidden: torch.Tensor, labels: torch.Tensor) -> LossSum:
        loss = super().of_hidden(model, hidden, labels)
        if not torch.is_grad_enabled():
            return loss
        self.has_gone_back |= self.trainer.current_step < self.seen_at
        self.seen_at = self.trainer.current_step
        is_now = self.trainer.current_step == self.step and not self.has_gone_back
        return LossSum(loss.total * self.factor, loss.tokens) if is_now else loss


class DiesAt(Callback):
    """As if the machine had gone."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Trainer, step: int) -> None:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path) -> None:
    """Every run of the list, over the ranks that were launched."""
    from dataclasses import replace

    from llm_trainer.config import TrainingConfig
    from llm_trainer.config.resolve.parallelism import resolve_plan

    launch = launch_environment()
    with joined(launch, TrainingConfig(device="cpu")) as ranks:
        for run in json.loads((folder / "runs.json").read_text(encoding="utf-8")):
            config = tiny_config(folder / run["name"], run["model"], **run["settings"])
            train(folder, run, replace(ranks, plan=resolve_plan(config.training, launch.world_size)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_process(0)
