"""A run's scaling schedule: read, checked against the model that it will change, printed before training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from llm_trainer.config import TrainingConfig
    from llm_trainer.config.schema.scaling_schedule import Operation
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


def first_after_the_end(schedule: Sequence[Operation], steps: int) -> int | None:
    """The number of the first entry that waits until the end of the run or longer, whatever the loss.

    Args:
        schedule: The entries.
        steps: The step at which the run ends.
    """
    earliest = 0
    for number, operation in enumerate(schedule, 1):
        earliest += 0 if operation.trigger_loss is not None else operation.max_wait_iters or 0
        if earliest >= steps:
            return number
    return None


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
    lines = [
        f"schedule: {count} operation{'s' if count != 1 else ''}, {triggered} triggered by a loss",
        f"  after the last one: {stages[-1]}",
    ]
    late = first_after_the_end(orchestrator.schedule, run.length.steps)
    if late is not None:
        lines.append(
            f"  the operations from entry {late} on cannot fire: they wait until the run's end, step "
            f"{run.length.steps:,}, or longer"
        )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
