"""A run's scaling schedule: read, checked against the model that it will change, printed before training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from llm_trainer.config import TrainingConfig
    from llm_trainer.orchestration.orchestrator import Orchestrator
    from llm_trainer.training.run import TrainingRun


def build_orchestrator(training: TrainingConfig) -> Orchestrator | None:
    """The callback that carries out the run's schedule.

    Args:
        training: The setting `scaling_schedule_file`.

    Returns:
        The callback, or None without a schedule.

    Raises:
        UsageError: If the file is not a schedule.
    """
    if training.scaling_schedule_file is None:
        return None
    from llm_trainer.config.schema.scaling_schedule import read_schedule
    from llm_trainer.orchestration.orchestrator import Orchestrator

    return Orchestrator(read_schedule(Path(training.scaling_schedule_file)))


def print_schedule(orchestrator: Orchestrator, run: TrainingRun, console: Console) -> None:
    """Dry-run the schedule and print what the run will be at its end.

    A resumed run is checked from its start too: what was carried out then led to its present shape.

    Args:
        orchestrator: The schedule.
        run: The run.
        console: Where to print.

    Raises:
        UsageError: For an entry that cannot be carried out.
    """
    from llm_trainer.orchestration.orchestrator import dry_run_schedule

    stages = dry_run_schedule(orchestrator.schedule, run)
    triggered = sum(1 for operation in orchestrator.schedule if operation.trigger_loss is not None)
    count = len(orchestrator.schedule)
    for line in (
        f"schedule: {count} operations, {triggered} of them triggered by a loss",
        f"  after the last one: {stages[-1]}",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
