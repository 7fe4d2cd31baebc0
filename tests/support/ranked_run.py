"""Trains one tiny run after another in each rank of a launch.

Usage: torchrun … ranked_run.py FOLDER, where FOLDER/runs.json is a list of {name, settings, model}. Each run
goes to FOLDER/<name>. Further keys of a run:

- `document_every`: The data are documents of so many tokens.
- `poisoned_step`: The last rank's loss at this step is not a number, or `poison` times what it was, once.
- `dies_at`: The last rank kills itself after this step, at the launcher's first attempt.
"""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rank_process import train_each
from rich.console import Console
from tiny_run import tiny_config, tiny_model, tokens

from llm_trainer.config.resolve.parallelism import resolve_plan
from llm_trainer.distributed.process_group import ProcessGroup
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.callbacks.callback import Callback
from llm_trainer.training.objectives.objective import LossSum, NextToken
from llm_trainer.training.run import TrainingRun
from llm_trainer.training.trainer import Trainer


def train(folder: Path, run: dict[str, Any], process_group: ProcessGroup) -> None:
    """Trains one of the runs."""
    config = tiny_config(folder / str(run["name"]), run["model"], **run["settings"])
    process_group = replace(process_group, plan=resolve_plan(config.training, process_group.world_size))
    model = tiny_model(config.model)
    every = run.get("document_every")
    data = tokens(document_every=every), tokens(65, seed=1, document_every=every)
    trainer = Trainer(model, config, *data, console=Console(quiet=True), process_group=process_group)
    is_last = process_group.rank == process_group.world_size - 1
    if is_last and "poisoned_step" in run:
        trainer.run.engine.objective = Poisoned(
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

    def from_hidden_states(self, model: Transformer, hidden: torch.Tensor, labels: torch.Tensor) -> LossSum:
        loss = super().from_hidden_states(model, hidden, labels)
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

    def on_step_end(self, run: TrainingRun, step: int) -> None:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    train_each(train)
