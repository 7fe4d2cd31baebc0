"""Resolves the two meanings of `batch_size`: all later code has only a micro-batch size and a number of
accumulation steps per rank.

If `micro_batch_size` is set, `batch_size` is that of the whole step, over all ranks: accumulation =
batch_size / (micro_batch_size × ranks). Otherwise `batch_size` is the micro-batch size of one rank, and
`gradient_accumulation_steps` multiplies it. nanoGPT's configuration files count the accumulation over all
ranks together (`global_grad_accumulation`); it is then divided by the number of ranks.

With `micro_batch_size: auto` or `use_adaptive_batch_size`, only the size of the step is resolved here. The
micro-batch size is found when the run starts: `micro_batch_bounds` gives its bounds, and `divisions` the
possible sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

from llm_trainer.config.schema.run_config import RunConfig
from llm_trainer.config.schema.training import TrainingConfig
from llm_trainer.errors import UsageError

DEFAULT_BATCH_SIZE = 8


@dataclass(frozen=True)
class BatchPlan:
    """How one rank runs a step: the micro-batch size in sequences, and the number of micro-batches."""

    micro_batch_size: int
    gradient_accumulation_steps: int

    def sequences_per_step(self, ranks: int) -> int:
        """Sequences in one optimizer update, over `ranks` data-parallel ranks."""
        return self.micro_batch_size * self.gradient_accumulation_steps * ranks


@dataclass(frozen=True)
class MicroBatchBounds:
    """The smallest and the largest micro-batch size that may be chosen, in sequences."""

    minimum: int = 1
    maximum: int | None = None


def micro_batch_bounds(config: RunConfig) -> MicroBatchBounds | None:
    """Bounds of a micro-batch size that is to be found; None where it is set."""
    efficiency = config.computational_efficiency
    if config.training.use_computational_efficiency and efficiency.use_adaptive_batch_size:
        return MicroBatchBounds(efficiency.min_batch_size, efficiency.max_batch_size)
    return MicroBatchBounds() if config.training.micro_batch_size == "auto" else None


def divisions(plan: BatchPlan, bounds: MicroBatchBounds) -> list[BatchPlan]:
    """The ways to divide a rank's sequences of a step into micro-batches.

    Args:
        plan: Micro-batch size and accumulation, whose product is to be divided.
        bounds: Bounds of the micro-batch size.

    Returns:
        The possible plans, the largest micro-batch first.

    Raises:
        UsageError: No micro-batch size within the bounds divides the sequences.
    """
    sequences = plan.micro_batch_size * plan.gradient_accumulation_steps
    maximum = sequences if bounds.maximum is None else bounds.maximum
    found = [
        BatchPlan(size, sequences // size)
        for size in range(min(maximum, sequences), 0, -1)
        if size >= bounds.minimum and sequences % size == 0
    ]
    if not found:
        raise UsageError(
            f"no micro-batch size from min_batch_size {bounds.minimum} to max_batch_size {maximum} divides "
            f"the {sequences} sequences of a rank's step; change the bounds or batch_size"
        )
    return found


def resolve_batches(training: TrainingConfig, ranks: int) -> BatchPlan:
    """Resolve `batch_size`, `micro_batch_size` and `gradient_accumulation_steps`.

    Args:
        training: The settings.
        ranks: Number of data-parallel ranks.

    Returns:
        Micro-batch size and accumulation of one rank.

    Raises:
        UsageError: The numbers are not divisible.
    """
    total, micro = training.batch_size, training.micro_batch_size
    accumulation = _accumulation_per_rank(training, ranks)
    if micro == "auto":
        return BatchPlan(_sequences_per_rank(training, ranks, accumulation), 1)
    if micro is None:
        return BatchPlan(total or DEFAULT_BATCH_SIZE, accumulation or 1)
    if total is None:
        return BatchPlan(micro, accumulation or 1)
    if total % (micro * ranks):
        below, above = total // (micro * ranks) * micro * ranks, -(-total // (micro * ranks)) * micro * ranks
        raise UsageError(
            f"batch_size {total} is not a multiple of micro_batch_size {micro} × {ranks} "
            f"rank{'s' if ranks > 1 else ''} = {micro * ranks}; use batch_size "
            f"{f'{below} or ' if below else ''}{above}, or another micro_batch_size"
        )
    steps = total // (micro * ranks)
    if accumulation is not None and accumulation != steps:
        raise UsageError(
            f"batch_size {total} / (micro_batch_size {micro} × ranks {ranks}) = {steps}, "
            f"but gradient_accumulation_steps is {accumulation}; remove one of them"
        )
    return BatchPlan(micro, steps)


def _sequences_per_rank(training: TrainingConfig, ranks: int, accumulation: int | None) -> int:
    """Sequences of one rank in a step, however they will be divided into micro-batches."""
    total = training.batch_size
    if total is None:
        return DEFAULT_BATCH_SIZE * (accumulation or 1)
    if accumulation is not None:
        raise UsageError(
            f"micro_batch_size auto derives the accumulation from batch_size {total}, but "
            "gradient_accumulation_steps is "
            f"{accumulation}; remove it"
        )
    if total % ranks:
        raise UsageError(
            f"batch_size {total} is not divisible by {ranks} ranks; use {total // ranks * ranks or ranks}"
        )
    return total // ranks


def _accumulation_per_rank(training: TrainingConfig, ranks: int) -> int | None:
    steps = training.gradient_accumulation_steps
    if steps is None or not training.global_grad_accumulation:
        return steps
    if steps % ranks:
        raise UsageError(
            f"gradient_accumulation_steps {steps} counts all ranks together (as in nanoGPT) and is not "
            "divisible by "
            f"{ranks} ranks; change it, or set global_grad_accumulation=False"
        )
    return steps // ranks
