"""Seeds dropout as a function of the position in the run, so that no generator state has to be saved."""

from __future__ import annotations

import torch

from llm_trainer.data.hashing import GOLDEN_GAMMA, splitmix64


def seed_dropout(seed: int, step: int, micro_batch: int, rank: int, device: torch.device) -> None:
    """Seed the generator that dropout draws from for one micro-batch.

    A resumed run then draws what the uninterrupted run would have drawn.

    Args:
        seed: The run's seed.
        step: The step, counted from 0.
        micro_batch: The micro-batch within the step.
        rank: The index of the tokens that this rank computes on (`ProcessGroup.token_rank`).
        device: Where the model runs.
    """
    mixed = seed
    for part in (step, micro_batch, rank):  # neighbouring values give unrelated seeds
        mixed = splitmix64(mixed + part + GOLDEN_GAMMA)
    generator = torch.default_generator
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index or 0]
    elif device.type == "mps":
        torch.mps.manual_seed(mixed)
        return
    generator.manual_seed(mixed)
