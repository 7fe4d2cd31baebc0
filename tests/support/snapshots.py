"""A snapshot of a tiny run, for the tests of saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_run import tiny_config, tiny_model

from llm_trainer.training.checkpoint.store import CheckpointData
from llm_trainer.training.optim.optimizers import build_optimizers


def snapshot(
    run_folder: Path, seed: int = 7, state: dict[str, Any] | None = None, optimizer: str = "adamw"
) -> CheckpointData:
    """A model that has made two steps."""
    config = tiny_config(run_folder, optimizer=optimizer)
    model = tiny_model(config.model, seed)
    optimizers = build_optimizers(model, config.training)
    for _ in range(2):
        model(torch.arange(8)[None]).square().mean().backward()
        for one in optimizers:
            one.step()
            one.zero_grad()
    return CheckpointData(model, optimizers, state or {"step": 2}, config, None)
