"""Under torchrun: small runs in which one rank runs out of memory; each rank leaves what came of it in
`outcome-<rank>.json`.

Run as `torchrun … short_ranks.py FOLDER`: trains every run of `FOLDER/runs.json` there, one after another, in
one process a rank.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tiny_run import tiny_config, tiny_model, tokens

from llm_trainer.config import TrainingConfig
from llm_trainer.config.environment import launch_environment
from llm_trainer.config.resolve.parallelism import resolve_plan
from llm_trainer.data.sampling.samplers import Batch
from llm_trainer.distributed.process_group import Ranks, end_process, joined
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.memory.out_of_memory import OutOfMemory
from llm_trainer.training.objectives.objective import LossSum, NextToken
from llm_trainer.training.trainer import Trainer


class Short(NextToken):
    """From a step on there is memory for so many sequences only, in the forward pass or in the backward pass."""

    def __init__(self, trainer: Trainer, sequences: int, from_step: int, place: str) -> None:
        super().__init__()
        self.trainer, self.sequences, self.from_step, self.place = trainer, sequences, from_step, place

    def __call__(self, model: Transformer, batch: Batch) -> LossSum:
        loss = super().__call__(model, batch)
        if (
            len(batch) <= self.sequences
            or self.trainer.state.step < self.from_step
            or not torch.is_grad_enabled()
        ):
            return loss
        if self.place == "forward":
            raise torch.OutOfMemoryError("out of memory")

        def refuse(_: torch.Tensor) -> None:
            hook.remove()
            raise torch.OutOfMemoryError("out of memory")

        hook = next(model.blocks[0].parameters()).register_hook(refuse)
        return loss


def train(folder: Path, run: dict[str, Any], ranks: Ranks) -> None:
    """One of the runs."""
    config = tiny_config(folder / run["name"], {"dropout": 0.0}, **run["settings"])
    ranks = replace(ranks, plan=resolve_plan(config.training, ranks.count))
    trainer = Trainer(
        tiny_model(config.model),
        config,
        tokens(),
        tokens(65, seed=1),
        console=Console(quiet=True),
        ranks=ranks,
    )
    if "short" in run and ranks.rank == 1:
        trainer.engine.objective = Short(trainer, **run["short"])
    if "allowance" in run and ranks.rank == 1:
        machine, allowance = (
            trainer.watcher.machine,
            trainer.watcher.machine.allowance,
        )  # the ranks of a machine ask each other there
        machine.allowance = lambda ranks: 0 * allowance(ranks) + machine.held() + int(run["allowance"])  # type: ignore[method-assign]
    outcome: dict[str, object] = {}
    try:
        outcome["ended_by"] = trainer.train().ended_by
    except OutOfMemory as error:
        outcome["error"] = str(error)
        if ranks.count > 1 and not error.is_agreed:
            (folder / f"{run['name']}-outcome-{ranks.rank}.json").write_text(
                json.dumps(outcome), encoding="utf-8"
            )
            raise
    outcome |= {"micro_batch_size": trainer.batches.micro_batch_size, "step": trainer.state.step}
    (folder / f"{run['name']}-outcome-{ranks.rank}.json").write_text(json.dumps(outcome), encoding="utf-8")


def main(folder: Path) -> None:
    """Every run of the list, over the ranks that were launched."""
    with joined(launch_environment(), TrainingConfig(device="cpu")) as ranks:
        for run in json.loads((folder / "runs.json").read_text(encoding="utf-8")):
            train(folder, run, ranks)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_process(0)
