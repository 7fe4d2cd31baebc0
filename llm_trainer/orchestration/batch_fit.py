"""`adjust_batch_size`: the largest micro-batch that fits into memory, at the same sequences a step.

What a step needs is found as preflight finds it, on tensors without contents (training/footprint.py), so that nothing has to run out of
memory first. It grows by the sequence, so two sizes say what all need.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from llm_trainer.training.trainer import Trainer

DEFAULT_SHARE = 0.9


def fitted(trainer: Trainer, value: float | Mapping[str, float] | None) -> tuple[int, int]:
    """(sequences of a micro-batch, micro-batches): the largest pair with the same product whose step stays within memory, at least 1.

    `value`: a share of memory, or `{target_vram_percent, max_batch_size}`; None: 0.9 of it. All ranks agree on the smallest finding.
    """
    said = value if isinstance(value, Mapping) else {}
    share = value if isinstance(value, (int, float)) else said.get("target_vram_percent", 100 * DEFAULT_SHARE) / 100
    sequences = trainer.batches.micro_batch_size * trainer.batches.gradient_accumulation_steps
    most = min(sequences, int(said.get("max_batch_size", sequences)))
    fits = _sequences_that_fit(trainer, share)
    micro = next(size for size in range(max(1, min(most, fits)), 0, -1) if sequences % size == 0)
    micro = -trainer.ranks.largest([-micro])[0]
    return micro, sequences // micro


def _sequences_that_fit(trainer: Trainer, share: float) -> int:
    from llm_trainer.training.footprint import step_memory

    precision = trainer.engine.precision.name
    one, two = (step_memory(trainer.model.config, trainer.training, sequences=count, precision=precision) for count in (1, 2))
    a_sequence = max(1, two.peak() - one.peak())
    spare = int(share * _memory(trainer.device)) - one.between_steps // trainer.ranks.plan.fsdp - one.peak()
    return 1 + max(0, spare // a_sequence)


def _memory(device: torch.device) -> int:
    """Bytes that this process may use: the GPU's memory, or what the machine has free beside what the process holds."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    import psutil

    return int(psutil.virtual_memory().available + psutil.Process().memory_info().rss)
