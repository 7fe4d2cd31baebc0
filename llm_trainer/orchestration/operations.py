"""The operations that change the model: each is a function from one ModelState to another.

Optimizer state is changed along with the weights (`model/surgery`). The same functions run on a state without
contents (tensors on the meta device) when a schedule is checked before training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from llm_trainer.config.schema.lora import DEFAULT_ADAPTER
from llm_trainer.config.schema.scaling_schedule import Operation
from llm_trainer.errors import UsageError
from llm_trainer.model.adapters.lora import (
    adapter_name_of,
    freeze_inactive_adapters,
    merge_lora,
    set_lora_rank,
    train_adapters_only,
)
from llm_trainer.model.module_names import set_trainable
from llm_trainer.model.surgery.depth import stack_layers
from llm_trainer.model.surgery.model_state import ModelState, TensorState
from llm_trainer.model.surgery.pruning import prune_heads, prune_mlp
from llm_trainer.model.surgery.vocabulary import read_remapping, resize_vocabulary
from llm_trainer.model.surgery.width import widen_mlp, widen_model
from llm_trainer.model.transformer import Transformer

StateChange = Callable[[ModelState, Operation, torch.Generator], ModelState]


def apply_operation(state: ModelState, operation: Operation, seed: int) -> ModelState:
    """Apply an operation that changes the model.

    Args:
        state: The model and its optimizer state. It is not changed.
        operation: The operation.
        seed: Determines random choices.

    Returns:
        The model and its optimizer state after the operation.

    Raises:
        UsageError: If the operation does not fit the model, or leaves nothing to train.
    """
    generator = torch.Generator().manual_seed(seed)
    changed = MODEL_OPERATIONS[operation.name](state, operation, generator)
    if changed.frozen >= changed.weights.keys():
        raise UsageError(
            "nothing would be left to train: every module is frozen; unfreeze some first (unfreeze_layer)"
        )
    return changed


def _stack(state: ModelState, operation: Operation, generator: torch.Generator) -> ModelState:
    return stack_layers(state, operation.value, identity=operation.mode == "identity")


def _widen_mlp(state: ModelState, operation: Operation, generator: torch.Generator) -> ModelState:
    return widen_mlp(state, int(operation.value), generator=generator)


def _widen_model(state: ModelState, operation: Operation, generator: torch.Generator) -> ModelState:
    value = operation.value
    if isinstance(value, Mapping):
        value = list(value.values())
    numbers = value if isinstance(value, list) else [value]
    return widen_model(state, *map(int, numbers), approximate=operation.approximate, generator=generator)


def _resize_vocabulary(state: ModelState, operation: Operation, generator: torch.Generator) -> ModelState:
    value = operation.value if isinstance(operation.value, Mapping) else {"size": operation.value}
    remapping = read_remapping(value["remap_file"]) if value.get("remap_file") else None
    return resize_vocabulary(state, int(value["size"]), remapping)


def _prune(prune: Callable[[ModelState, str, float], ModelState]) -> StateChange:
    return lambda state, operation, generator: prune(state, operation.value[0], float(operation.value[1]))


def _freeze(state: ModelState, parts: str | list[str], is_trainable: bool) -> ModelState:
    with torch.device("meta"):
        model = Transformer(state.config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in state.frozen)
    set_trainable(model, parts, is_trainable)
    freeze_inactive_adapters(model)
    frozen = frozenset(name for name, parameter in model.named_parameters() if not parameter.requires_grad)
    return replace(state, frozen=frozen)


def _with_lora(state: ModelState, change: Callable[[Transformer], object]) -> ModelState:
    """The state after a change of its adapters, which is made on a model with copies of the weights.

    The first adapters of a model freeze the base weights if `lora_train_base` is false, as they do where a
    run starts with adapters.
    """
    config = state.config.model_copy(deep=True)
    weights = {name: weight.clone() for name, weight in state.weights.items()}
    model = replace(state, config=config, weights=weights).to_model()
    change(model)
    if config.lora_train_base is False and model.config.has_adapters and not state.config.has_adapters:
        train_adapters_only(model)
    changed = ModelState.from_model(model)
    optimizer_state = {
        name: _resized(values, changed.weights[name])
        for name, values in state.optimizer_state.items()
        if name in changed.weights
    }
    return replace(
        changed, optimizer_state={name: values for name, values in optimizer_state.items() if values}
    )


def _resized(state: TensorState, weight: Tensor) -> dict[str, Tensor]:
    """Optimizer state for an adapter's factor whose rank has changed.

    With a higher rank, the old directions keep their state; new ones get zero, and for second moments the
    mean. With a lower rank the state is dropped, because its directions are different ones.
    """
    resized = {}
    for key, value in state.items():
        if not value.ndim or value.shape == weight.shape:
            resized[key] = value
        elif any(old > new for old, new in zip(value.shape, weight.shape, strict=True)):
            return {}
        else:
            larger = torch.zeros(weight.shape, dtype=value.dtype, device=value.device)
            larger += value.mean() if key.endswith("_sq") else 0
            larger[tuple(slice(size) for size in value.shape)] = value
            resized[key] = larger
    return resized


def _set_rank_of(parts: Callable[[ModelState], list[str]]) -> StateChange:
    return lambda state, operation, generator: _with_rank(
        state, parts(state), int(operation.value), generator
    )


def _set_rank_of_one(state: ModelState, operation: Operation, generator: torch.Generator) -> ModelState:
    part, rank = operation.value
    return _with_rank(state, part, int(rank), generator)


def _with_rank(
    state: ModelState, parts: str | list[str], rank: int, generator: torch.Generator
) -> ModelState:
    """The state with other ranks of the adapter `default`.

    Raises UsageError if that adapter exists but is inactive, because it would not be trained.
    """
    active = state.config.active_adapter_names
    if DEFAULT_ADAPTER in state.config.lora and DEFAULT_ADAPTER not in active:
        raise UsageError(
            f"operations set the ranks of the adapter {DEFAULT_ADAPTER!r}, which is not active; active are: "
            f"{', '.join(active) or 'none'} (active_adapters)"
        )
    return _with_lora(state, lambda model: set_lora_rank(model, parts, rank, seed=generator.initial_seed()))


def _merge(state: ModelState, operation: Operation, generator: torch.Generator) -> ModelState:
    """Merged adapters restart from other random directions, so their optimizer state is dropped."""
    merged: list[str] = []
    changed = _with_lora(state, lambda model: merged.extend(merge_lora(model, seed=generator.initial_seed())))
    remaining = {
        name: values
        for name, values in changed.optimizer_state.items()
        if adapter_name_of(name) not in merged
    }
    return replace(changed, optimizer_state=remaining)


MODEL_OPERATIONS: Mapping[str, StateChange] = {
    "stack_layers": _stack,
    "widen_mlp": _widen_mlp,
    "widen_model": _widen_model,
    "resize_vocabulary": _resize_vocabulary,
    "prune_heads": _prune(prune_heads),
    "prune_mlp": _prune(prune_mlp),
    "freeze_layer": lambda state, operation, generator: _freeze(state, operation.value, False),
    "unfreeze_layer": lambda state, operation, generator: _freeze(state, operation.value, True),
    "set_embedding_freeze_mode": lambda state, operation, generator: _freeze(
        state, "wte", not operation.value
    ),
    "set_embedding_finetune_mode": lambda state, operation, generator: _freeze(
        state, "wte", bool(operation.value)
    ),
    "set_layer_lora_rank": _set_rank_of_one,
    "set_attn_lora_rank": _set_rank_of(
        lambda state: [f"attn.{layer}" for layer in range(state.config.num_hidden_layers)]
    ),
    "set_embedding_lora_rank": _set_rank_of(lambda state: ["wte"]),
    "merge_lora_weights": _merge,
}
"""The function of each operation that changes the model."""
