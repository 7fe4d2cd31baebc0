"""The largest micro-batch that fits: found by trying, or estimated.

A step is the same however it is divided: its samples follow from the position of the run, and each
micro-batch's loss is divided by the tokens of the whole step. So the division may change between two steps,
or between two attempts at one.

On a GPU the largest micro-batch is found by real forward and backward passes of the run's own batches. Where
trying is not possible (on a CPU the system would kill the process instead of refusing memory; shards need all
ranks in every pass) it follows from the estimate of `memory_estimator.py` and the memory that this rank may
use. All ranks take the smallest of what each of them found.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from llm_trainer.config import TrainingConfig
from llm_trainer.config.resolve.batch_size import BatchPlan, MicroBatchBounds, divisions
from llm_trainer.data.sampling.batch import Sampler
from llm_trainer.distributed.parallelize import is_sharded
from llm_trainer.distributed.process_group import ProcessGroup
from llm_trainer.run_dir import JSON, TEMPORARY_PREFIX, read_json
from llm_trainer.training.engines.engine import Engine
from llm_trainer.training.engines.out_of_memory import OutOfMemory
from llm_trainer.training.logging.system_stats import SystemStats
from llm_trainer.training.memory.memory_estimator import step_memory

MEMORY_FILE = "memory.json"
_BATCH_SETTINGS = ("batch_size", "micro_batch_size", "gradient_accumulation_steps")


@dataclass(frozen=True)
class BatchSizeFinder:
    """Finds the largest micro-batch that fits for one run. It changes nothing.

    Attributes:
        engine: The engine of the run.
        sampler: The order of samples.
        machine: Measures the memory of this rank.
        process_group: The ranks, which agree on the result.
    """

    engine: Engine
    sampler: Sampler
    machine: SystemStats
    process_group: ProcessGroup

    def find(self, batches: BatchPlan, bounds: MicroBatchBounds, fraction: float, samples: int) -> BatchPlan:
        """The largest micro-batch that fits. A collective call between two steps.

        Args:
            batches: The present division of a rank's part of the step.
            bounds: Smallest and largest micro-batch that may be chosen.
            fraction: Fraction of the memory that may be used.
            samples: Samples consumed so far, whose successors are tried.

        Returns:
            The division of the same step with the largest micro-batch.

        Raises:
            UsageError: If no micro-batch within the bounds divides the step, and in a pipeline.
            OutOfMemory: If not even the smallest fits.
        """
        self.engine.check_search()
        choices = divisions(batches, bounds)
        allowed = int(self.machine.memory_budget(self.process_group) * fraction)
        can_try = self.engine.device.type == "cuda" and not is_sharded(self.engine.model)
        needed = self._measure(samples) if can_try else self._estimate()
        low, high = 0, len(choices)  # choices from `high` on fit
        while low < high:
            middle = (low + high) // 2
            if needed(choices[middle]) <= allowed:
                high = middle
            else:
                low = middle + 1
        chosen = self.process_group.all_reduce_max([high])[0]
        if chosen == len(choices):
            raise OutOfMemory(
                f"not even micro_batch_size {choices[-1].micro_batch_size} fits into {allowed / 1e9:.2f} GB, "
                f"{fraction:.0%} of the memory; use gradient_checkpointing, fsdp, a shorter context or a "
                "smaller model, or raise memory_limit_gb"
            )
        return choices[chosen]

    def _measure(self, samples: int) -> Callable[[BatchPlan], float]:
        """Bytes at the peak of a real pass, plus the optimizer's state where that does not exist yet;
        infinite where memory runs out.
        """
        missing = self._missing_optimizer_bytes()

        def needed(plan: BatchPlan) -> float:
            empty_cache(self.engine.device)
            try:
                self.engine.trial(self.sampler.batch(samples, plan.micro_batch_size))
            except OutOfMemory:
                return float("inf")
            return torch.cuda.max_memory_allocated(self.engine.device) + missing

        return needed

    def _estimate(self) -> Callable[[BatchPlan], float]:
        """Bytes at the peak of a step: what is used now, what the optimizers will use, and the step itself as
        `memory_estimator.py` computes it.
        """
        plan = self.process_group.plan
        shards = plan.shards * plan.tensor_parallel
        used = self.machine.memory_in_use()

        def needed(plan: BatchPlan) -> float:
            step = step_memory(
                self.engine.model.config,
                self.engine.training,
                sequences=plan.micro_batch_size,
                micro_batches=plan.gradient_accumulation_steps,
            )
            missing = self._missing_optimizer_bytes(step.optimizer // shards)
            return used + step.loss_buffers + missing + step.peak()

        return needed

    def _missing_optimizer_bytes(self, total: int | None = None) -> int:
        """State that the optimizers will still allocate (by default two averages per parameter)."""
        optimizers = self.engine.optimizers
        if self.engine.training.offload_optimizer or any(optimizer.state for optimizer in optimizers):
            return 0
        parameters = [
            one for optimizer in optimizers for group in optimizer.param_groups for one in group["params"]
        ]
        return 2 * sum(parameter.nbytes for parameter in parameters) if total is None else total


def smaller_micro_batch(batches: BatchPlan, error: OutOfMemory) -> BatchPlan:
    """The division of a step to retry with after it ran out of memory: micro-batches at most half as large.

    Args:
        batches: The division that did not fit.
        error: What the step raised.

    Raises:
        OutOfMemory: If the micro-batch is a single sequence already.
    """
    if batches.micro_batch_size == 1:
        raise OutOfMemory(
            f"{error}, and there is no smaller micro-batch; use gradient_checkpointing, fsdp, a shorter "
            "context or a smaller model"
        )
    return divisions(batches, MicroBatchBounds(1, batches.micro_batch_size // 2))[0]


def write_memory_note(run_dir: Path, smaller: BatchPlan, training: TrainingConfig, rank: int) -> None:
    """Leave the smaller micro-batch for the next attempt, where this rank's failure ends the run.

    Args:
        run_dir: The run folder.
        smaller: The division of a step to use next time.
        training: The settings, which the next attempt compares.
        rank: This rank; several may run out of memory at once.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = run_dir / f"{TEMPORARY_PREFIX}{MEMORY_FILE}-{rank}"
    note = {"micro_batch_size": smaller.micro_batch_size, "settings": _batch_settings(training)}
    temporary.write_text(json.dumps(note), encoding="utf-8")
    temporary.replace(run_dir / MEMORY_FILE)


def take_memory_note(
    run_dir: Path, training: TrainingConfig, process_group: ProcessGroup
) -> tuple[int | None, bool]:
    """Read and remove the note of an attempt that ran out of memory. A collective call.

    Args:
        run_dir: The run folder.
        training: The settings of now.
        process_group: The ranks.

    Returns:
        The micro-batch size that the note asks for, if any, and whether the batch settings are still those of
        that attempt.

    Raises:
        CheckpointError: If the note is damaged.
    """

    def take() -> dict[str, JSON]:
        note = run_dir / MEMORY_FILE
        if not note.exists():
            return {}
        found = read_json(note)
        note.unlink()
        return found

    found: dict[str, JSON] = json.loads(
        process_group.broadcast_text(json.dumps(process_group.run_on_main(take)))
    )
    size = found.get("micro_batch_size")
    settings = found.get("settings", found.get("said"))
    return (size if isinstance(size, int) else None), settings == _batch_settings(training)


def empty_cache(device: torch.device) -> None:
    """Release what the GPU's allocator caches, and reset its peak statistics. Does nothing on other devices.

    Args:
        device: The device.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _batch_settings(training: TrainingConfig) -> dict[str, JSON]:
    return {name: getattr(training, name) for name in _BATCH_SETTINGS}
