"""Chooses the engine that the settings ask for."""

from __future__ import annotations

import torch

from llm_trainer.config import TrainingConfig
from llm_trainer.config.resolve.batch_size import BatchPlan
from llm_trainer.config.resolve.deepspeed import DeepSpeedConfig
from llm_trainer.distributed.process_group import ProcessGroup
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.engines.deepspeed import DeepSpeedEngine
from llm_trainer.training.engines.engine import Engine
from llm_trainer.training.engines.pipeline import PipelineEngine
from llm_trainer.training.objectives.objective import Objective


def build_engine(
    model: Transformer,
    training: TrainingConfig,
    objective: Objective | None,
    process_group: ProcessGroup,
    device: torch.device,
    *,
    batches: BatchPlan,
    deepspeed: DeepSpeedConfig | None = None,
) -> Engine:
    """Build the engine of a run.

    Args:
        model: The model. It may be sharded from here on.
        training: The settings.
        objective: What is minimised (default: next-token cross-entropy).
        process_group: The ranks, with their plan.
        device: Where this rank computes.
        batches: Micro-batch size and accumulation per rank.
        deepspeed: The DeepSpeed file, where one is used.

    Raises:
        UsageError: If nothing can be trained, or the plan does not fit the model.
    """
    if process_group.plan.pipeline_parallel > 1:
        return PipelineEngine(model, training, objective, process_group, device)
    if training.use_deepspeed:
        return DeepSpeedEngine(
            model, training, objective, process_group, device, batches=batches, file=deepspeed
        )
    return Engine(model, training, objective, process_group, device)
