"""`adjust_batch_size`: the largest micro-batch that fits into memory, at the same sequences a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llm_trainer.errors import UsageError
from llm_trainer.training.memory.batch_size_finder import largest_micro_batch
from llm_trainer.training.memory.out_of_memory import OutOfMemory

if TYPE_CHECKING:
    from llm_trainer.training.trainer import Trainer


def fitted(trainer: Trainer, value: float | Mapping[str, float] | None) -> tuple[int, int]:
    """(sequences of a micro-batch, micro-batches): the largest pair with the same product whose step stays
    within memory, at least 1.

    `value`: a share of memory, or `{target_vram_percent, max_batch_size}`; None: `memory_target` of it. All ranks agree. Where no size
    within the bounds divides the step, the division stays as it is: a run does not end for want of a faster one.
    """
    said = value if isinstance(value, Mapping) else {}
    percent, most = said.get("target_vram_percent"), said.get("max_batch_size")
    share = value if isinstance(value, (int, float)) else None if percent is None else percent / 100
    try:
        found = largest_micro_batch(trainer, share=share, most=None if most is None else int(most))
    except OutOfMemory as error:  # the run goes on all the same: what is there may still do
        trainer.say(f"adjust_batch_size: {error}")
        return 1, trainer.batches.micro_batch_size * trainer.batches.gradient_accumulation_steps
    except UsageError as error:
        trainer.say(f"adjust_batch_size changes nothing: {error}")
        return trainer.batches.micro_batch_size, trainer.batches.gradient_accumulation_steps
    return found.micro_batch_size, found.gradient_accumulation_steps
