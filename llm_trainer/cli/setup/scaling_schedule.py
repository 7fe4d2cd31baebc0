"""A run's scaling schedule: read, judged whole against the model that it will change, and told, before the
first step.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from llm_trainer.config import TrainingConfig
    from llm_trainer.orchestration.orchestrator import Orchestrator
    from llm_trainer.training.trainer import Trainer


def orchestrator_for(training: TrainingConfig) -> Orchestrator | None:
    """The callback that carries out the run's schedule; None without one. Raises UsageError for a file that
    is none.
    """
    if training.scaling_schedule_file is None:
        return None
    from llm_trainer.config.schema.scaling_schedule import read_schedule
    from llm_trainer.orchestration.orchestrator import Orchestrator

    return Orchestrator(read_schedule(Path(training.scaling_schedule_file)))


def tell_schedule(orchestrator: Orchestrator, trainer: Trainer, console: Console) -> None:
    """Run the schedule through without training and tell what the run will be like at its end; raises
    UsageError for what cannot be.

    A run that goes on is judged from its beginning too: what has fired then is what led to its shape now.
    """
    from llm_trainer.orchestration.orchestrator import foreseen

    stages = foreseen(orchestrator.schedule, trainer)
    waits = sum(1 for operation in orchestrator.schedule if operation.trigger_loss is not None)
    console.print(
        f"schedule: {len(orchestrator.schedule)} operations, {waits} of them at a loss",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"  at its end: {stages[-1]}", markup=False, highlight=False, soft_wrap=True)
