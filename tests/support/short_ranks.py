"""Under torchrun: small runs in which one rank runs out of memory; each rank leaves what came of it in
`outcome-<rank>.json`.

Run as `torchrun … short_ranks.py FOLDER`: trains every run of `FOLDER/runs.json` there, one after another, in
one process a rank.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rank_process import train_each
from rich.console import Console
from tiny_run import tiny_config, tiny_model, tokens

from llm_trainer.config.resolve.parallelism import resolve_plan
from llm_trainer.data.sampling.batch import Batch
from llm_trainer.distributed.process_group import ProcessGroup
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.engines.out_of_memory import OutOfMemory
from llm_trainer.training.objectives.objective import LossSum, NextToken
from llm_trainer.training.trainer import Trainer


class Short(NextToken):
    """From a step on, memory is enough for so many sequences only, in the forward or in the backward pass."""

    def __init__(self, trainer: Trainer, sequences: int, from_step: int, place: str) -> None:
        super().__init__()
        self.trainer, self.sequences, self.from_step, self.place = trainer, sequences, from_step, place

    def __call__(self, model: Transformer, batch: Batch) -> LossSum:
        loss = super().__call__(model, batch)
        if (
            len(batch) <= self.sequences
            or self.trainer.run.state.step < self.from_step
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


def train(folder: Path, run: dict[str, Any], process_group: ProcessGroup) -> None:
    """One of the runs."""
    config = tiny_config(folder / run["name"], {"dropout": 0.0}, **run["settings"])
    process_group = replace(process_group, plan=resolve_plan(config.training, process_group.world_size))
    trainer = Trainer(
        tiny_model(config.model),
        config,
        tokens(),
        tokens(65, seed=1),
        console=Console(quiet=True),
        process_group=process_group,
    )
    if "short" in run and process_group.rank == 1:
        trainer.run.engine.objective = Short(trainer, **run["short"])
    if "allowance" in run and process_group.rank == 1:
        machine, allowance = (
            trainer.run.monitor.machine,
            trainer.run.monitor.machine.memory_budget,
        )  # the ranks of a machine ask each other there
        machine.memory_budget = lambda ranks: (
            0 * allowance(ranks) + machine.memory_in_use() + int(run["allowance"])
        )  # type: ignore[method-assign]
    outcome: dict[str, object] = {}
    try:
        outcome["ended_by"] = trainer.train().ended_by
    except OutOfMemory as error:
        outcome["error"] = str(error)
        if process_group.world_size > 1 and not error.is_agreed:
            (folder / f"{run['name']}-outcome-{process_group.rank}.json").write_text(
                json.dumps(outcome), encoding="utf-8"
            )
            raise
    outcome |= {"micro_batch_size": trainer.run.batches.micro_batch_size, "step": trainer.run.state.step}
    (folder / f"{run['name']}-outcome-{process_group.rank}.json").write_text(
        json.dumps(outcome), encoding="utf-8"
    )


if __name__ == "__main__":
    train_each(train)
