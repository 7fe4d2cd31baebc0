"""A schedule run through without training: every entry's effect on the shape and the settings, so that what
cannot be is said at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llm_trainer.config.resolve.batch_size import BatchPlan
from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.config.schema.scaling_schedule import Operation
from llm_trainer.errors import UsageError
from llm_trainer.model.hf.checkpoint import empty_model
from llm_trainer.model.surgery.model_state import Form, form_of
from llm_trainer.orchestration import operations
from llm_trainer.orchestration.run_overrides import CHANGES, Settings

EXITS = ("enable_exit", "disable_exit")


@dataclass(frozen=True)
class Stage:
    """What a run is like between two entries of its schedule."""

    config: ModelConfig
    parameters: int
    settings: Settings

    def __str__(self) -> str:
        shape = self.config
        return (
            f"{shape.num_hidden_layers} layers × {shape.hidden_size}, {shape.num_attention_heads} heads, MLPs of {shape.mlp_width}, "
            f"{shape.vocab_size:,} ids: {self.parameters / 1e6:,.2f} M parameters; {self.settings}"
        )


def simulate(
    schedule: Sequence[Operation],
    config: ModelConfig,
    settings: Settings,
    *,
    ids_in_data: int = 0,
    frozen: frozenset[str] = frozenset(),
    check: Callable[[ModelConfig], None] = lambda shape: None,
    check_batches: Callable[[BatchPlan], None] = lambda plan: None,
) -> list[Stage]:
    """The run after each entry, the beginning first. `ids_in_data` are how many ids the tokens use, `frozen` what is not trained at first;
    `check` raises UsageError for a shape that the model cannot be given, as where its ranks could not cut it, and
    `check_batches` for a step that cannot be divided so.

    Raises UsageError that names the entry, and where an earlier one has made it impossible, that one too.
    """
    form = Form(config, form_of(empty_model(config, "meta")).weights, frozen=frozen)
    stages, shaped_by = [Stage(form.config, form.parameters, settings)], ""
    for number, operation in enumerate(schedule, 1):
        place = f"entry {number} of the schedule, {operation.name} {operation.value!r}"
        try:
            after = _after(form, operation, number, ids_in_data)
            if after is not form:
                check(after.config)
            if operation.name in CHANGES:
                settings = CHANGES[operation.name](settings, operation)
                check_batches(BatchPlan(settings.micro_batch_size, settings.gradient_accumulation_steps))
        except UsageError as error:
            because = f" (the model is as {shaped_by} left it)" if shaped_by else ""
            raise UsageError(f"{place}: {error}{because}") from None
        if after is not form:
            form, shaped_by = after, f"entry {number}, {operation.name} {operation.value!r},"
        stages.append(Stage(form.config, form.parameters, settings))
    return stages


def _after(form: Form, operation: Operation, seed: int, ids_in_data: int) -> Form:
    if operation.name in EXITS:
        raise UsageError(
            "early exits come with adaptive reasoning, which is not built yet in this version; leave the entry out"
        )
    if operation.name not in operations.CHANGES:
        return form
    after = operations.changed(form, operation, seed)
    if after.config.vocab_size < ids_in_data:
        raise UsageError(
            f"a vocabulary of {after.config.vocab_size} is too small for the data, which uses {ids_in_data} ids"
        )
    return after
