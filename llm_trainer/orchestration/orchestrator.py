"""Carries out a scaling schedule between the steps of a run.

Only the first pending entry can fire: its `trigger_loss` is compared at each validation, whose result all
ranks share, and its `max_wait_iters` at each step. After it has fired the next entry is considered at once.
What has fired, and since when the next entry waits, is in the checkpoint; what the operations made of model
and run is there too, so a resumed run repeats nothing.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch

from llm_trainer.config import CheckpointError, UsageError
from llm_trainer.config.schema.scaling_schedule import Operation
from llm_trainer.orchestration.dry_run import Stage, dry_run
from llm_trainer.orchestration.event_log import Event, EventLog
from llm_trainer.orchestration.operations import MODEL_OPERATIONS, apply_operation
from llm_trainer.orchestration.run_overrides import (
    SETTING_OPERATIONS,
    RunSettings,
    apply_settings,
    fit_batch_size,
)
from llm_trainer.run_dir import JSON
from llm_trainer.training.callbacks.callback import Callback
from llm_trainer.training.engines.validation import ValidationResult
from llm_trainer.training.run import TrainingRun


class Orchestrator(Callback):
    """The callback that carries out a schedule, which `dry_run_schedule` has checked.

    Args:
        schedule: The entries, in order.
    """

    def __init__(self, schedule: Sequence[Operation]) -> None:
        self.schedule = list(schedule)
        self.fired: list[JSON] = []
        self.waiting_since = 0
        self.validates_at_start = any(operation.trigger_loss is not None for operation in self.schedule)

    def between_steps(self, run: TrainingRun, step: int, validation: ValidationResult | None) -> None:
        """Carry out the entries that are due, one after the other."""
        loss = validation.loss if validation is not None else None
        while len(self.fired) < len(self.schedule):
            operation = self.schedule[len(self.fired)]
            why = trigger_of(operation, loss, step - self.waiting_since)
            if why is None:
                return
            loss = self._fire(run, operation, why, loss)

    def _fire(self, run: TrainingRun, operation: Operation, why: str, loss: float | None) -> float | None:
        """Carry out an entry, evaluate again if it asks for that, log it; returns the loss that the next
        entry is judged by.
        """
        start, number, before = time.perf_counter(), len(self.fired) + 1, _num_parameters(run)
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        _carry_out(run, operation, run.training.seed + number)
        seconds = time.perf_counter() - start
        run.meter.exclude(seconds)
        self.fired.append(_identity(operation))
        self.waiting_since = run.current_step
        after = run.validate().loss if operation.reevaluate else None
        is_known = loss is not None or operation.reevaluate
        event = Event(
            entry=number,
            step=run.current_step,
            operation=operation.name,
            value=operation.value,
            why=why,
            desc=operation.desc,
            loss_before=loss if is_known else run.state.last_validation_loss,
            loss_after=after,
            parameters_before=before,
            parameters_after=_num_parameters(run),
            seconds=seconds,
        )
        run.log(str(event))
        if run.process_group.is_main:
            EventLog(run.run_dir).add(event)
        run.metrics_tracker.update(
            {"operation": number, "parameters": event.parameters_after}, run.current_step
        )
        run.metrics_tracker.add_text("operations", str(event), run.current_step)
        return after if operation.reevaluate else loss

    def state_dict(self) -> dict[str, JSON]:
        """What has fired, and the step since which the next entry waits."""
        return {"fired": list(self.fired), "waiting_since": self.waiting_since}

    def load_state_dict(self, state: Mapping[str, JSON]) -> None:
        """Restore the position in the schedule.

        Raises:
            UsageError: If the schedule does not start with what has fired.
            CheckpointError: If `state` is damaged.
        """
        fired, since = state.get("fired"), state.get("waiting_since")
        if not isinstance(fired, Sequence) or not isinstance(since, int):
            raise CheckpointError(f"the checkpoint's position in the schedule is damaged: {dict(state)!r}")
        names = [json.dumps(one, sort_keys=True) for one in fired]
        for number, (then, operation) in enumerate(zip(names, self.schedule, strict=False), 1):
            if then != json.dumps(_identity(operation), sort_keys=True):
                raise UsageError(
                    f"entry {number} of the schedule is {operation.name} {operation.value!r}, but this run "
                    f"has carried out {then} there; leave the entries that were carried out as they were, "
                    "and change only later ones"
                )
        if len(names) > len(self.schedule):
            raise UsageError(
                f"this run has carried out {len(names)} operations, and the schedule has only "
                f"{len(self.schedule)} entries; leave the entries that were carried out as they were"
            )
        self.fired, self.waiting_since = cast("list[JSON]", list(fired)), since


def dry_run_schedule(schedule: Sequence[Operation], run: TrainingRun) -> list[Stage]:
    """Check a schedule against a run that has not started.

    Args:
        schedule: The entries.
        run: The run.

    Returns:
        The run at the start and after each entry.

    Raises:
        UsageError: For an entry that cannot be carried out.
    """
    if run.eval_dataset is None:
        _check_needs_no_loss(schedule)
    return dry_run(
        schedule,
        run.model.config,
        RunSettings.of_run(run),
        data_vocab_size=run.train_dataset.vocab_size,
        frozen=run.engine.initially_frozen,
        check_shape=run.engine.check_change,
        check_batches=run.engine.check_batches,
    )


def trigger_of(operation: Operation, loss: float | None, waited: int) -> str | None:
    """Why an entry fires now.

    Args:
        operation: The entry.
        loss: This step's validation loss, if there was a validation.
        waited: Steps since the entry before it fired.

    Returns:
        The reason in words; None if it does not fire.
    """
    if operation.trigger_loss is not None and loss is not None and loss < operation.trigger_loss:
        is_limit = math.isfinite(operation.trigger_loss)
        return f"loss {loss:.4f} below {operation.trigger_loss:g}" if is_limit else "at once"
    if operation.max_wait_iters is not None and waited >= operation.max_wait_iters:
        return f"after {waited} steps" if operation.max_wait_iters else "at once"
    return None


def _check_needs_no_loss(schedule: Sequence[Operation]) -> None:
    """Raises UsageError for an entry that needs a validation loss."""
    for number, operation in enumerate(schedule, 1):
        # With max_wait_iters 0 an entry fires at once, whatever the loss.
        waits_for_loss = operation.trigger_loss is not None and operation.max_wait_iters != 0
        if operation.reevaluate or waits_for_loss:
            needs = "reevaluate" if operation.reevaluate else f"trigger_loss {operation.trigger_loss:g}"
            instead = "" if operation.reevaluate else " and set max_wait_iters"
            raise UsageError(
                f"entry {number} of the schedule, {operation.name} {operation.value!r}, has {needs}, but "
                "there is no validation split; prepare the data with val_ratio above 0, or remove "
                f"it{instead}"
            )


def _carry_out(run: TrainingRun, operation: Operation, seed: int) -> None:
    if operation.name in MODEL_OPERATIONS:
        run.restructure(lambda state: apply_operation(state, operation, seed))
        return
    old = RunSettings.of_run(run)
    if operation.name == "adjust_batch_size":
        batches = fit_batch_size(run, operation.value)
        new = replace(
            old,
            micro_batch_size=batches.micro_batch_size,
            gradient_accumulation_steps=batches.gradient_accumulation_steps,
        )
    else:
        new = SETTING_OPERATIONS[operation.name](old, operation)
    apply_settings(run, old, new)


def _identity(operation: Operation) -> JSON:
    return {"name": operation.name, "value": operation.value}


def _num_parameters(run: TrainingRun) -> int:
    return sum(parameter.numel() for parameter in run.model.parameters())
