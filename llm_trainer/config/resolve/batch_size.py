"""The two meanings of `batch_size`, settled once: everything behind this knows `micro_batch_size` and
`gradient_accumulation_steps` only.

With `micro_batch_size` given, `batch_size` is the whole step's, over all ranks: accumulation = batch_size /
(micro_batch_size × ranks). Otherwise `batch_size` is one rank's micro-batch and `gradient_accumulation_steps`
multiplies it. In nanoGPT's files that counts all ranks together (`global_grad_accumulation`) and is
divided by their number.

With `micro_batch_size: auto` or `use_adaptive_batch_size` the step is settled here and its division into
micro-batches when the run starts: `micro_batch_bounds` says within which bounds, `divisions` which there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_trainer.config.schema.training import TrainingConfig
from llm_trainer.errors import UsageError

if TYPE_CHECKING:
    from llm_trainer.config.schema.run_config import RunConfig

DEFAULT_BATCH_SIZE = 8


@dataclass(frozen=True)
class BatchPlan:
    """What one rank does in a step: so many micro-batches of so many sequences."""

    micro_batch_size: int
    gradient_accumulation_steps: int

    def sequences_per_step(self, ranks: int) -> int:
        """Sequences in one optimizer update, over all ranks."""
        return self.micro_batch_size * self.gradient_accumulation_steps * ranks


@dataclass(frozen=True)
class MicroBatchBounds:
    """The smallest and the largest micro-batch that may be chosen."""

    least: int = 1
    most: int | None = None


def micro_batch_bounds(config: RunConfig) -> MicroBatchBounds | None:
    """Bounds of a micro-batch that is to be found; None where it is said."""
    efficiency = config.computational_efficiency
    if config.training.use_computational_efficiency and efficiency.use_adaptive_batch_size:
        return MicroBatchBounds(efficiency.min_batch_size, efficiency.max_batch_size)
    return MicroBatchBounds() if config.training.micro_batch_size == "auto" else None


def divisions(plan: BatchPlan, bounds: MicroBatchBounds) -> list[BatchPlan]:
    """The ways to divide a rank's part of the step within bounds, the largest micro-batch first. Raises
    UsageError where there is none.
    """
    sequences = plan.micro_batch_size * plan.gradient_accumulation_steps
    most = sequences if bounds.maximum is None else bounds.maximum
    found = [
        BatchPlan(size, sequences // size)
        for size in range(min(most, sequences), 0, -1)
        if size >= bounds.minimum and sequences % size == 0
    ]
    if not found:
        raise UsageError(
            f"no micro-batch from min_batch_size {bounds.minimum} to max_batch_size {most} divides the {sequences} sequences that a rank "
            "has in a step; change the bounds or batch_size"
        )
    return found


def resolve_batches(training: TrainingConfig, ranks: int) -> BatchPlan:
    """The pair behind `batch_size`, `micro_batch_size` and `gradient_accumulation_steps`; raises UsageError
    where they do not divide.
    """
    whole, micro = training.batch_size, training.micro_batch_size
    accumulation = _accumulation_per_rank(training, ranks)
    if micro == "auto":
        return BatchPlan(_part_of_step(training, ranks, accumulation), 1)
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


def _part_of_step(training: TrainingConfig, ranks: int, accumulation: int | None) -> int:
    """Sequences of one rank in a step, however they will be divided."""
    whole = training.batch_size
    if whole is None:
        return DEFAULT_BATCH_SIZE * (accumulation or 1)
    if accumulation is not None:
        raise UsageError(
            f"micro_batch_size auto settles the accumulation from batch_size {whole}, but gradient_accumulation_steps says {accumulation}; "
            "leave it out"
        )
    if whole % ranks:
        raise UsageError(
            f"batch_size {whole} does not divide by {ranks} ranks; take {whole // ranks * ranks or ranks}"
        )
    return whole // ranks


def _accumulation_per_rank(training: TrainingConfig, ranks: int) -> int | None:
    said = training.gradient_accumulation_steps
    if said is None or not training.global_grad_accumulation:
        return said
    if said % ranks:
        raise UsageError(
            f"gradient_accumulation_steps {said} counts all ranks together here (nanoGPT's meaning) and does not divide by {ranks} ranks; "
            "change it, or set global_grad_accumulation=False"
        )
    return said // ranks
