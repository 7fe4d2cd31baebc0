"""The two meanings of `batch_size`, settled once: everything behind this knows `micro_batch_size` and `gradient_accumulation_steps` only.

With `micro_batch_size` given, `batch_size` is the whole step's, over all ranks: accumulation = batch_size / (micro_batch_size × ranks).
Otherwise `batch_size` is one rank's micro-batch and `gradient_accumulation_steps` multiplies it. In nanoGPT's files that counts all
ranks together (`accumulation_counts_all_ranks`) and is divided by their number.
"""

from __future__ import annotations

from dataclasses import dataclass

from llm_trainer.config.errors import UsageError
from llm_trainer.config.training import TrainingConfig

DEFAULT_BATCH_SIZE = 8


@dataclass(frozen=True)
class BatchPlan:
    """What one rank does in a step: so many micro-batches of so many sequences."""

    micro_batch_size: int
    gradient_accumulation_steps: int

    def sequences_per_step(self, ranks: int) -> int:
        """Sequences in one optimizer update, over all ranks."""
        return self.micro_batch_size * self.gradient_accumulation_steps * ranks


def resolve_batches(training: TrainingConfig, ranks: int) -> BatchPlan:
    """The pair behind `batch_size`, `micro_batch_size` and `gradient_accumulation_steps`; raises UsageError where they do not divide."""
    whole, micro = training.batch_size, training.micro_batch_size
    accumulation = _accumulation_per_rank(training, ranks)
    if micro is None:
        return BatchPlan(whole or DEFAULT_BATCH_SIZE, accumulation or 1)
    if whole is None:
        return BatchPlan(micro, accumulation or 1)
    if whole % (micro * ranks):
        below, above = whole // (micro * ranks) * micro * ranks, -(-whole // (micro * ranks)) * micro * ranks
        raise UsageError(
            f"batch_size {whole} is not a multiple of micro_batch_size {micro} × {ranks} rank{'s' if ranks > 1 else ''} = {micro * ranks}; "
            f"take batch_size {f'{below} or ' if below else ''}{above}, or another micro_batch_size"
        )
    steps = whole // (micro * ranks)
    if accumulation is not None and accumulation != steps:
        raise UsageError(
            f"batch_size {whole} / (micro_batch_size {micro} × ranks {ranks}) = {steps}, "
            f"but gradient_accumulation_steps says {accumulation}; leave one out"
        )
    return BatchPlan(micro, steps)


def _accumulation_per_rank(training: TrainingConfig, ranks: int) -> int | None:
    said = training.gradient_accumulation_steps
    if said is None or not training.accumulation_counts_all_ranks:
        return said
    if said % ranks:
        raise UsageError(
            f"gradient_accumulation_steps {said} counts all ranks together here (nanoGPT's meaning) and does not divide by {ranks} ranks; "
            "change it, or set accumulation_counts_all_ranks=False"
        )
    return said // ranks
