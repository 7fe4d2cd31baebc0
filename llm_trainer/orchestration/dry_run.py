"""A schedule carried out without training: the effect of every entry on the shape and the settings.

So an entry that cannot be carried out is an error before the first step, and not in the middle of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llm_trainer.config.resolve.batch_size import BatchPlan
from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.config.schema.scaling_schedule import Operation
from llm_trainer.errors import UsageError
from llm_trainer.model.hf.checkpoint import empty_model
from llm_trainer.model.surgery.model_state import ModelState
from llm_trainer.orchestration.operations import MODEL_OPERATIONS, apply_operation
from llm_trainer.orchestration.run_overrides import SETTING_OPERATIONS, RunSettings

_EXIT_OPERATIONS = ("enable_exit", "disable_exit")


@dataclass(frozen=True)
class Stage:
    """A run between two entries of its schedule.

    Attributes:
        config: The shape.
        parameters: Parameters of the model.
        settings: The settings in effect.
    """

    config: ModelConfig
    parameters: int
    settings: RunSettings

    def __str__(self) -> str:
        shape = self.config
        return (
            f"{shape.num_hidden_layers} layers × {shape.hidden_size}, {shape.num_attention_heads} heads, "
            f"MLPs of {shape.mlp_width}, vocabulary {shape.vocab_size:,}: "
            f"{self.parameters / 1e6:,.2f} M parameters; {self.settings}"
        )


def dry_run(
    schedule: Sequence[Operation],
    config: ModelConfig,
    settings: RunSettings,
    *,
    data_vocab_size: int = 0,
    frozen: frozenset[str] = frozenset(),
    check_shape: Callable[[ModelConfig], None] = lambda shape: None,
    check_batches: Callable[[BatchPlan], None] = lambda plan: None,
) -> list[Stage]:
    """Carry out a schedule on tensors without contents.

    Args:
        schedule: The entries.
        config: The shape at the start.
        settings: The settings at the start.
        data_vocab_size: Ids that the data use, which the vocabulary must hold.
        frozen: Names of the parameters that are not trained at the start.
        check_shape: Raises UsageError for a shape that the engine cannot train.
        check_batches: Raises UsageError for a step that the engine cannot run divided so.

    Returns:
        The run at the start and after each entry.

    Raises:
        UsageError: For an entry that cannot be carried out. It names the entry, and the earlier entry that
            has made it impossible, if one has.
    """
    state = ModelState(config, ModelState.from_model(empty_model(config, "meta")).weights, frozen=frozen)
    stages, shaped_by = [Stage(state.config, state.num_parameters, settings)], ""
    for number, operation in enumerate(schedule, 1):
        entry = f"{operation.name} {operation.value!r}"
        try:
            after = _after(state, operation, number, data_vocab_size)
            if after is not state:
                check_shape(after.config)
            if operation.name in SETTING_OPERATIONS:
                settings = SETTING_OPERATIONS[operation.name](settings, operation)
                check_batches(settings.batches)
        except UsageError as error:
            because = f" (the shape is the result of {shaped_by})" if shaped_by else ""
            raise UsageError(f"entry {number} of the schedule, {entry}: {error}{because}") from None
        if after is not state:
            state, shaped_by = after, f"entry {number}, {entry}"
        stages.append(Stage(state.config, state.num_parameters, settings))
    return stages


def _after(state: ModelState, operation: Operation, seed: int, data_vocab_size: int) -> ModelState:
    if operation.name in _EXIT_OPERATIONS:
        raise UsageError(
            "early exits are not implemented in this version (they come with adaptive reasoning); remove the "
            "entry"
        )
    if operation.name not in MODEL_OPERATIONS:
        return state
    after = apply_operation(state, operation, seed)
    if after.config.vocab_size < data_vocab_size:
        raise UsageError(
            f"a vocabulary of {after.config.vocab_size} is too small for the data, which use "
            f"{data_vocab_size} ids"
        )
    return after
