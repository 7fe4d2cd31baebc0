"""A run, resolved: everything that follows from settings, ranks, data and checkpoints, settled once.

Order of a start:

1. `find_checkpoint` (checkpoint/resume.py): fetch from remote storage if need be, search, verify.
2. `resolve_settings` (config/resolve/settings.py): DeepSpeed file, batch sizes.
3. `resolve_run` (here): device, order of samples, length, learning-rate schedule.

The command line does 1 and 2 before the data and the model are opened. `Trainer` does all three for a caller
who passes plain configurations. After that the settings do not change: what operations change while the run
trains is in `TrainingState.overrides`, on top of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from llm_trainer.config import RunConfig, TrainingConfig
from llm_trainer.config.resolve.batch_size import BatchPlan, MicroBatchBounds
from llm_trainer.config.resolve.deepspeed import DeepSpeedConfig
from llm_trainer.config.resolve.settings import ResolvedSettings, resolve_settings
from llm_trainer.data.sampling.batch import Sampler
from llm_trainer.data.sampling.samplers import build_training_sampler
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.device import resolve_device
from llm_trainer.distributed.process_group import ProcessGroup
from llm_trainer.model.hf.generation_config import GenerationDefaults
from llm_trainer.training.checkpoint.resume import find_checkpoint
from llm_trainer.training.optim.lr_schedule import (
    LRSchedule,
    RunLength,
    resolve_lr_schedule,
    resolve_run_length,
    with_fitting_warmup,
)


@dataclass(frozen=True)
class ResolvedRun:
    """What a training needs to know before its first step.

    Attributes:
        config: All settings, complete. The saved run.json is this.
        process_group: The ranks that train together, with their plan.
        device: Where this rank computes.
        batches: Micro-batch size and accumulation per rank.
        micro_batch_bounds: Bounds of the micro-batch size that is to be found; None where it is set.
        deepspeed: The DeepSpeed file, where one is used.
        checkpoint: The verified checkpoint folder that the run resumes from; None for a new run.
        context: Tokens in a sequence.
        sampler: The order of samples: sample i is a function of data, seed and i.
        length: The length in steps.
        schedule: The learning rate of a new run at every step.
        generation: What the base model says about generation, which every checkpoint carries on.
    """

    config: RunConfig
    process_group: ProcessGroup
    device: torch.device
    batches: BatchPlan
    micro_batch_bounds: MicroBatchBounds | None
    deepspeed: DeepSpeedConfig | None
    checkpoint: Path | None
    context: int
    sampler: Sampler
    length: RunLength
    schedule: LRSchedule
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)

    @property
    def training(self) -> TrainingConfig:
        """The section `training`."""
        return self.config.training

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.config.training.output_dir)

    @property
    def sequences_per_step(self) -> int:
        """Sequences in one optimizer update, over all ranks."""
        return self.batches.sequences_per_step(self.process_group.plan.data_ranks)

    @property
    def resumes_in_place(self) -> bool:
        """Whether the run resumes from a checkpoint in its own run folder."""
        return self.checkpoint is not None and self.checkpoint.parent.resolve() == self.run_dir.resolve()


def resolve_config(
    config: RunConfig, process_group: ProcessGroup, log: Callable[[str], None] = print
) -> tuple[ResolvedSettings, Path | None]:
    """Find the checkpoint to resume from and complete the settings: steps 1 and 2 for a caller from Python.

    Args:
        config: All sections. It is not changed.
        process_group: The ranks that train together. A collective call.
        log: Called with each line for the user.

    Returns:
        The complete settings, and the verified checkpoint folder or None.

    Raises:
        UsageError: For settings that contradict each other.
        CheckpointError: If the checkpoint that is named does not exist or is damaged.
    """
    training, checkpoint = find_checkpoint(config.training, process_group, log)
    config = config.model_copy(update={"training": training})
    return resolve_settings(config, process_group.plan), checkpoint


def resolve_run(
    settings: ResolvedSettings,
    train_dataset: TokenDataset,
    *,
    context: int,
    tokenizer: Tokenizer | None = None,
    checkpoint: Path | None = None,
    process_group: ProcessGroup | None = None,
    console: Console | None = None,
    generation: GenerationDefaults | None = None,
) -> ResolvedRun:
    """Resolve what depends on the data and on this machine.

    Args:
        settings: Complete settings.
        train_dataset: The training split.
        context: Tokens in a sequence: the model's `max_position_embeddings`.
        tokenizer: The data's tokenizer, which augmentation needs.
        checkpoint: The verified checkpoint folder to resume from.
        process_group: The ranks that train together (default: this process alone).
        console: Shows progress of what takes longer than two seconds.
        generation: What the pretrained weights' folder says about generation. A resumed run takes it from the
            checkpoint.

    Returns:
        The resolved run.

    Raises:
        UsageError: For a device that does not exist, or settings that do not fit the data.
        DataError: For data that is too short.
    """
    process_group = process_group or ProcessGroup()
    training = settings.config.training
    sequences = settings.batches.sequences_per_step(process_group.plan.data_ranks)
    device = resolve_device(training.device)
    sampler = build_training_sampler(
        train_dataset,
        context,
        training.seed,
        settings.config.data,
        tokenizer,
        sequences_per_step=sequences,
        console=console,
    )
    length = resolve_run_length(
        training, samples_per_epoch=sampler.samples_per_epoch, sequences_per_step=sequences, context=context
    )
    training = with_fitting_warmup(training, length)
    if checkpoint is not None:
        generation = GenerationDefaults.read(checkpoint)
    return ResolvedRun(
        config=settings.config.model_copy(update={"training": training}),
        process_group=process_group,
        device=device,
        batches=settings.batches,
        micro_batch_bounds=settings.micro_batch_bounds,
        deepspeed=settings.deepspeed,
        checkpoint=checkpoint,
        context=context,
        sampler=sampler,
        length=length,
        schedule=resolve_lr_schedule(training, length),
        generation=generation or GenerationDefaults(),
    )
