"""How much goes through the model at once: found by trying, and made smaller where memory ran out.

A step is the same whatever it is divided into: the samples of a step follow from its place in the run, and
each micro-batch's loss is divided by the tokens of the whole step. So the division may change between two
steps, or between two tries of one.

The largest that fits is found on a GPU by real forward and backward passes of the run's own batches, and
where trying is not possible (on a CPU the system would end the process instead of refusing; shards need all
ranks in each pass) by the estimate of `footprint.py` within the memory that this rank may hold. All ranks
take the smallest of what each found.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llm_trainer.config.resolve.batch_size import BatchPlan, MicroBatchBounds, divisions
from llm_trainer.config.schema.training import TrainingConfig
from llm_trainer.data.sampling.samplers import Batch, Prefetcher
from llm_trainer.distributed.context_parallel import part_of
from llm_trainer.distributed.parallelize import is_sharded
from llm_trainer.run_dir import JSON, TEMPORARY_PREFIX, read_json
from llm_trainer.training.changes import take_batches
from llm_trainer.training.memory.memory_estimator import step_memory
from llm_trainer.training.memory.out_of_memory import OutOfMemory
from llm_trainer.training.standing import goes_on_here

if TYPE_CHECKING:
    from llm_trainer.training.engines.engine import StepResult
    from llm_trainer.training.trainer import Trainer

MEMORY_NOTE = "memory.json"


def open_batches(trainer: Trainer) -> Prefetcher[Batch]:
    """This rank's micro-batches from where the run stands."""
    first, size, ranks = trainer.state.samples, trainer.batches.micro_batch_size, trainer.ranks

    def load(number: int) -> Batch:
        return part_of(
            trainer.sampler.batch(first + (number * ranks.data_count + ranks.data_rank) * size, size), ranks
        )

    return Prefetcher(load, 0, trainer.training.num_workers)


def step_within_memory(
    trainer: Trainer, batches: Sequence[Batch], tokens: int, rate_factor: float
) -> StepResult | None:
    """The engine's step; None where memory did not do for it and it is to be tried again with other
    micro-batches. Raises OutOfMemory.
    """
    try:
        return trainer.engine.step(batches, tokens, rate_factor=rate_factor, index=trainer.state.step)
    except OutOfMemory as error:
        retry_with_less(trainer, error)
        return None


def settle_micro_batch(trainer: Trainer) -> None:
    """Before the first step: find what fits where the settings ask for that, unless a resumed run knows. A
    collective call.
    """
    if trainer.training.eval_only:
        return
    bounds, known, noted = trainer.micro_batch_bounds, trainer.state.changes.micro_batch_size, _noted(trainer)
    if noted is not None:
        was = trainer.batches.micro_batch_size
        _divide(trainer, noted)
        trainer.say(
            f"micro_batch_size {noted}: memory ran out with {was} before, as {MEMORY_NOTE} said, which is removed now; "
            "micro_batch_size or batch_size said otherwise than then count more"
        )
    elif bounds is not None and known is None:
        chosen = _largest_that_fits(trainer, bounds, trainer.training.memory_target)
        _divide(trainer, chosen.micro_batch_size)
        trainer.say(
            f"micro_batch_size {chosen.micro_batch_size}: the largest that fits; {chosen.gradient_accumulation_steps} a step"
        )
    trainer.engine.check_batches(trainer.batches)


def largest_micro_batch(
    trainer: Trainer, *, share: float | None = None, most: int | None = None
) -> BatchPlan:
    """The largest micro-batch, of `most` sequences or fewer, that fits in `share` of the memory (default:
    `memory_target`), and how many of it make the same step. For all ranks, between two steps; nothing is
    changed.

    Raises UsageError where no micro-batch within the bounds divides a rank's part of the step, and in a
    pipeline, OutOfMemory where the smallest does not fit.
    """
    bounds = trainer.micro_batch_bounds or MicroBatchBounds()
    largest = min((one for one in (most, bounds.most) if one is not None), default=None)
    return _largest_that_fits(
        trainer, MicroBatchBounds(bounds.least, largest), share or trainer.training.memory_target
    )


def _divide(trainer: Trainer, size: int) -> None:
    """Let the step be divided into micro-batches of `size`, in the state too, so that a resumed run does the
    same.
    """
    trainer.state.changes = replace(
        trainer.state.changes, micro_batch_size=size, sequences_per_step=trainer.sequences_per_step
    )
    take_batches(trainer)


def retry_with_less(trainer: Trainer, error: OutOfMemory) -> None:
    """After a step that ran out of memory on some rank and changed nothing: an emergency checkpoint, then a
    smaller micro-batch.

    Raises `error` where the smallest was not small enough, and where the ranks could not agree; then a run
    that goes on from its newest checkpoint, as torchrun's restarts do, takes the smaller one.
    """
    now = trainer.batches
    if now.micro_batch_size == 1:
        raise OutOfMemory(
            f"{error}, and there is no smaller micro-batch; use gradient_checkpointing, fsdp, a shorter context or a smaller model"
        )
    smaller = divisions(now, MicroBatchBounds(1, now.micro_batch_size // 2))[0]
    if not error.is_agreed:
        _leave_note(trainer, smaller)
        raise OutOfMemory(
            f"{error}; go on with --resume auto, which takes micro_batch_size {smaller.micro_batch_size} then",
            is_agreed=False,
        )
    _free_cache(trainer.device)
    if trainer.state.step:
        trainer.saving.save(emergency=True)
    trainer.say(
        f"step {trainer.state.step + 1}: {error}; trying it again with micro_batch_size {smaller.micro_batch_size} × "
        f"{smaller.gradient_accumulation_steps} micro-batches, the same step in all"
    )
    _divide(trainer, smaller.micro_batch_size)
    trainer.restart_batches()
    trainer.metrics_tracker.update({"micro_batch_size": smaller.micro_batch_size}, trainer.state.step)


def _leave_note(trainer: Trainer, smaller: BatchPlan) -> None:
    """For the next attempt, where this rank's end is the run's."""
    trainer.run_dir.mkdir(parents=True, exist_ok=True)
    temporary = (
        trainer.run_dir / f"{TEMPORARY_PREFIX}{MEMORY_NOTE}-{trainer.ranks.rank}"
    )  # several may run out at once
    note = {"micro_batch_size": smaller.micro_batch_size, "said": _said(trainer.training)}
    temporary.write_text(json.dumps(note), encoding="utf-8")
    temporary.replace(trainer.run_dir / MEMORY_NOTE)


def _noted(trainer: Trainer) -> int | None:
    """What an attempt that ran out of memory left for this one, which takes the note away: from here on the
    run's state says it.

    None where the run does not go on from that attempt, and where batches have been said otherwise since.
    Raises CheckpointError for a note that is none. A collective call.
    """
    found: dict[str, JSON] = json.loads(
        trainer.ranks.of_main(json.dumps(trainer.ranks.main_does(lambda: _taken_note(trainer.run_dir))))
    )
    begins_again = (
        trainer.resumed_from is None and trainer.training.resume_from is not None
    )  # before there was a checkpoint
    if not found or not (goes_on_here(trainer) or begins_again):
        return None
    size = found.get("micro_batch_size")
    if found.get("said") != _said(trainer.training):
        trainer.say(
            f"{MEMORY_NOTE} with micro_batch_size {size} does not count: other batches were said since; it is removed"
        )
        return None
    return size if isinstance(size, int) and size < trainer.batches.micro_batch_size else None


def _taken_note(run_folder: Path) -> dict[str, JSON]:
    """What the note says; empty without one."""
    note = run_folder / MEMORY_NOTE
    if not note.exists():
        return {}
    found = read_json(note)
    note.unlink()
    return found


def _said(training: TrainingConfig) -> dict[str, JSON]:
    """What the settings say of batches."""
    return {
        name: getattr(training, name)
        for name in ("batch_size", "micro_batch_size", "gradient_accumulation_steps")
    }


def _largest_that_fits(trainer: Trainer, bounds: MicroBatchBounds, share: float) -> BatchPlan:
    trainer.engine.check_search()
    choices = divisions(trainer.batches, bounds)
    allowed = int(trainer.watcher.machine.allowance(trainer.ranks) * share)
    can_try = trainer.device.type == "cuda" and not is_sharded(trainer.model)
    needs = _tried(trainer) if can_try else _estimated(trainer)
    low, high = 0, len(choices)  # choices from `high` on fit
    while low < high:
        middle = (low + high) // 2
        if needs(choices[middle]) <= allowed:
            high = middle
        else:
            low = middle + 1
    place = trainer.ranks.largest([high])[0]
    if place == len(choices):
        raise OutOfMemory(
            f"not even micro_batch_size {choices[-1].micro_batch_size} fits in {allowed / 1e9:.2f} GB, {share:.0%} of what is there; "
            "use gradient_checkpointing, fsdp, a shorter context or a smaller model, or raise memory_limit_gb"
        )
    return choices[place]


def _tried(trainer: Trainer) -> Callable[[BatchPlan], float]:
    """Bytes at the peak of a real pass, with the optimizer's state where that is not there yet; infinite
    where memory runs out.
    """
    missing = _optimizer_bytes_missing(trainer)

    def needs(plan: BatchPlan) -> float:
        _free_cache(trainer.device)
        try:
            trainer.engine.trial(trainer.sampler.batch(trainer.state.samples, plan.micro_batch_size))
        except OutOfMemory:
            return float("inf")
        return torch.cuda.max_memory_allocated(trainer.device) + missing

    return needs


def _estimated(trainer: Trainer) -> Callable[[BatchPlan], float]:
    """Bytes at the peak of a step: what is held now, what the optimizers will hold, and the step itself as
    `footprint.py` runs it.
    """
    shards = trainer.ranks.plan.shards * trainer.ranks.plan.tensor_parallel
    held = trainer.watcher.machine.held()

    def needs(plan: BatchPlan) -> float:
        step = step_memory(
            trainer.model.config,
            trainer.training,
            sequences=plan.micro_batch_size,
            micro_batches=plan.gradient_accumulation_steps,
        )
        return held + step.kept + _optimizer_bytes_missing(trainer, step.optimizer // shards) + step.peak()

    return needs


def _optimizer_bytes_missing(trainer: Trainer, all_of_it: int | None = None) -> int:
    """What the optimizers have still to make (by default two averages a parameter)."""
    parameters = [
        one
        for optimizer in trainer.engine.optimizers
        for group in optimizer.param_groups
        for one in group["params"]
    ]
    if trainer.training.offload_optimizer or any(optimizer.state for optimizer in trainer.engine.optimizers):
        return 0
    return 2 * sum(parameter.nbytes for parameter in parameters) if all_of_it is None else all_of_it


def _free_cache(device: torch.device) -> None:
    """Give what the allocator keeps back, and forget its highest point."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
