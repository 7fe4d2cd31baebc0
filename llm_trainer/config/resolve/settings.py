"""Settings that are complete: what every later stage reads, and nothing resolves again.

`resolve_settings` is called once per start, when everything that is set is known: after the command line, and
for a resumed run after the saved run's settings were merged underneath. It merges the DeepSpeed file and
resolves the batch sizes and the bounds of a micro-batch size that is still to be found.
"""

from __future__ import annotations

from dataclasses import dataclass

from llm_trainer.config.resolve.batch_size import (
    BatchPlan,
    MicroBatchBounds,
    micro_batch_bounds,
    resolve_batches,
)
from llm_trainer.config.resolve.deepspeed import DeepSpeedConfig, deepspeed_file, merge_deepspeed
from llm_trainer.config.resolve.parallelism import ParallelPlan
from llm_trainer.config.schema.run_config import RunConfig


@dataclass(frozen=True)
class ResolvedSettings:
    """Complete settings.

    Attributes:
        config: All sections, with the DeepSpeed file merged.
        plan: Sizes of the parallel dimensions.
        batches: Micro-batch size and accumulation per rank.
        micro_batch_bounds: Bounds of the micro-batch size that is to be found; None where it is set.
        deepspeed: The DeepSpeed file, where one is used.
    """

    config: RunConfig
    plan: ParallelPlan
    batches: BatchPlan
    micro_batch_bounds: MicroBatchBounds | None = None
    deepspeed: DeepSpeedConfig | None = None

    @property
    def sequences_per_step(self) -> int:
        """Sequences in one optimizer update, over all ranks."""
        return self.batches.sequences_per_step(self.plan.data_ranks)


def resolve_settings(config: RunConfig, plan: ParallelPlan) -> ResolvedSettings:
    """Complete the settings of a run.

    Args:
        config: Everything that is set. It is not changed.
        plan: Sizes of the parallel dimensions.

    Returns:
        The settings, with the DeepSpeed file merged and the batch sizes resolved.

    Raises:
        UsageError: If the DeepSpeed file contradicts the settings, or the batch sizes do not divide.
    """
    deepspeed = deepspeed_file(config.training)
    if deepspeed is not None:
        deepspeed.check_ranks(plan.ranks)
        config = merge_deepspeed(config, deepspeed)
    batches = resolve_batches(config.training, plan.data_ranks)
    return ResolvedSettings(config, plan, batches, micro_batch_bounds(config), deepspeed)
