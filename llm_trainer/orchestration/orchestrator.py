"""Runs a scaling schedule beside the training loop: judges the next entry at each step's edge, carries it
out, writes it down.

Only the first pending entry can fire: its loss is judged at each validation (which all ranks know alike), its
waiting at each step. After one has fired the next is judged at once. What has fired and since when is waited
is in the checkpoint; what the operations made of model and run is there too, so that a run that goes on
replays nothing.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from llm_trainer.config import CheckpointError, UsageError
from llm_trainer.config.schema.scaling_schedule import Operation
from llm_trainer.orchestration import operations
from llm_trainer.orchestration.batch_fit import fitted
from llm_trainer.orchestration.dry_run import Stage, simulate
from llm_trainer.orchestration.event_log import Entry, Journal
from llm_trainer.orchestration.run_overrides import CHANGES, put_into_effect, settings_of
from llm_trainer.training.callbacks import Callback
from llm_trainer.training.changes import restructure

if TYPE_CHECKING:
    from llm_trainer.run_dir import JSON
    from llm_trainer.training.engines.validation import ValidationResult
    from llm_trainer.training.trainer import Trainer


class Orchestrator(Callback):
    """Carries out `schedule`, which `simulation.simulate` has judged. Raises UsageError where what has fired
    already is not in it.
    """

    def __init__(self, schedule: Sequence[Operation]) -> None:
        self.schedule = list(schedule)
        self.fired: list[JSON] = []
        self.waiting_since = 0
        self.validates_at_start = any(operation.trigger_loss is not None for operation in self.schedule)

    def between_steps(self, trainer: Trainer, step: int, validation: ValidationResult | None) -> None:
        """Fire what is due, one entry after the other."""
        loss = validation.loss if validation is not None else None
        while len(self.fired) < len(self.schedule):
            operation = self.schedule[len(self.fired)]
            why = reason(operation, loss, step - self.waiting_since)
            if why is None:
                return
            loss = self._fire(trainer, operation, why, loss)

    def _fire(self, trainer: Trainer, operation: Operation, why: str, loss: float | None) -> float | None:
        """Carry out, evaluate again if asked to, tell; returns the loss that the next entry is judged by."""
        start, number, before = time.perf_counter(), len(self.fired) + 1, _parameters(trainer)
        if trainer.device.type == "cuda":
            import torch

            torch.cuda.synchronize(trainer.device)
        _carry_out(trainer, operation, trainer.training.seed + number)
        seconds = time.perf_counter() - start
        trainer.meter.leave_out(seconds)
        self.fired.append(_named(operation))
        self.waiting_since = trainer.current_step
        after = trainer.validate().loss if operation.reevaluate else None
        entry = Entry(
            entry=number,
            step=trainer.current_step,
            operation=operation.name,
            value=operation.value,
            why=why,
            desc=operation.desc,
            loss_before=trainer.state.last_validation_loss
            if loss is None and not operation.reevaluate
            else loss,
            loss_after=after,
            parameters_before=before,
            parameters_after=_parameters(trainer),
            seconds=seconds,
        )
        trainer.say(str(entry))
        if trainer.ranks.is_main:
            Journal(trainer.run_dir).add(entry)
        trainer.metrics_tracker.update(
            {"operation": number, "parameters": entry.parameters_after}, trainer.current_step
        )
        trainer.metrics_tracker.note("operations", str(entry), trainer.current_step)
        return after if operation.reevaluate else loss

    def state_dict(self) -> dict[str, JSON]:
        """What has fired, and the step from which the next entry waits."""
        return {"fired": list(self.fired), "waiting_since": self.waiting_since}

    def load_state_dict(self, state: Mapping[str, JSON]) -> None:
        """Take up an earlier place. Raises UsageError where the schedule does not begin with what has fired."""
        fired, since = state.get("fired"), state.get("waiting_since")
        if not isinstance(fired, Sequence) or not isinstance(since, int):
            raise CheckpointError(f"the checkpoint's place in the schedule is none: {dict(state)!r}")
        named = [json.dumps(one, sort_keys=True) for one in fired]
        for number, (then, operation) in enumerate(zip(named, self.schedule, strict=False), 1):
            if then != json.dumps(_named(operation), sort_keys=True):
                raise UsageError(
                    f"entry {number} of the schedule is {operation.name} {operation.value!r}, but {then} has fired in its place; "
                    "leave the entries that have fired as they were, and change only what comes after them"
                )
        if len(named) > len(self.schedule):
            raise UsageError(
                f"{len(named)} operations have fired in this run, and the schedule has only {len(self.schedule)} entries"
            )
        self.fired, self.waiting_since = cast("list[JSON]", list(fired)), since


def foreseen(schedule: Sequence[Operation], trainer: Trainer) -> list[Stage]:
    """What a run that has not begun will be like after each entry. Raises UsageError for a schedule that
    cannot be carried out.
    """
    if trainer.validation_tokens is None:
        _require_no_loss(schedule)
    engine, ids = trainer.engine, trainer.train_tokens.vocab_size
    return simulate(
        schedule,
        engine.model.config,
        settings_of(trainer),
        ids_in_data=ids,
        frozen=engine.frozen_at_first,
        check=engine.check_change,
        check_batches=engine.check_batches,
    )


def reason(operation: Operation, loss: float | None, waited: int) -> str | None:
    """Why an entry fires now, in words; None where it does not. `loss`: this step's validation loss, if there
    is one.
    """
    if operation.trigger_loss is not None and loss is not None and loss < operation.trigger_loss:
        return (
            f"loss {loss:.4f} below {operation.trigger_loss:g}"
            if math.isfinite(operation.trigger_loss)
            else "at once"
        )
    if operation.max_wait_iters is not None and waited >= operation.max_wait_iters:
        return f"after {waited} steps" if operation.max_wait_iters else "at once"
    return None


def _require_no_loss(schedule: Sequence[Operation]) -> None:
    """Raises UsageError for an entry that asks for a validation loss."""
    for number, operation in enumerate(schedule, 1):
        waits_for = (
            operation.trigger_loss is not None and operation.max_wait_iters != 0
        )  # 0: at once, whatever the loss
        if operation.reevaluate or waits_for:
            asks = "reevaluate" if operation.reevaluate else f"trigger_loss {operation.trigger_loss:g}"
            raise UsageError(
                f"entry {number} of the schedule, {operation.name} {operation.value!r}, has {asks}, and there is no validation split; "
                f"prepare the data with val_ratio above 0, or leave it out{'' if operation.reevaluate else ' and give max_wait_iters'}"
            )


def _carry_out(trainer: Trainer, operation: Operation, seed: int) -> None:
    if operation.name in operations.CHANGES:
        restructure(trainer, lambda form: operations.changed(form, operation, seed))
        return
    old = settings_of(trainer)
    if operation.name == "adjust_batch_size":
        micro, accumulation = fitted(trainer, operation.value)
        new = replace(old, micro_batch_size=micro, gradient_accumulation_steps=accumulation)
    else:
        new = CHANGES[operation.name](old, operation)
    put_into_effect(trainer, old, new)


def _named(operation: Operation) -> JSON:
    return {"name": operation.name, "value": operation.value}


def _parameters(trainer: Trainer) -> int:
    return sum(parameter.numel() for parameter in trainer.model.parameters())
