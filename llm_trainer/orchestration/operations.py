"""The operations that change the model: each a function from one form to another (`model/surgery`), optimizer
state included.

The same functions run on a form without contents (tensors on the meta device) when a schedule is checked
before training.
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

Change = Callable[[ModelState, Operation, torch.Generator], ModelState]


def apply_operation(form: ModelState, operation: Operation, seed: int) -> ModelState:
    """The form after an operation; random choices follow from `seed`. Raises UsageError where it cannot be,
    or could not be trained.
    """
    after = MODEL_OPERATIONS[operation.name](form, operation, torch.Generator().manual_seed(seed))
    if after.frozen >= after.weights.keys():
        raise UsageError(
            "nothing would be left to train: every part is frozen; let some go before (unfreeze_layer)"
        )
    return after


def _stack(form: ModelState, operation: Operation, generator: torch.Generator) -> ModelState:
    return stack_layers(form, operation.value, identity=operation.mode == "identity")


def _widen_mlp(form: ModelState, operation: Operation, generator: torch.Generator) -> ModelState:
    return widen_mlp(form, int(operation.value), generator=generator)


def _widen_model(form: ModelState, operation: Operation, generator: torch.Generator) -> ModelState:
    said = operation.value
    numbers = list(said.values()) if isinstance(said, Mapping) else said if isinstance(said, list) else [said]
    return widen_model(form, *map(int, numbers), approximate=operation.approximate, generator=generator)


def _resize_vocabulary(form: ModelState, operation: Operation, generator: torch.Generator) -> ModelState:
    said = operation.value if isinstance(operation.value, Mapping) else {"size": operation.value}
    remapping = read_remapping(said["remap_file"]) if said.get("remap_file") else None
    return resize_vocabulary(form, int(said["size"]), remapping)


def _prune(prune: Callable[[ModelState, str, float], ModelState]) -> Change:
    return lambda form, operation, generator: prune(form, operation.value[0], float(operation.value[1]))


def _freeze(form: ModelState, parts: str | list[str], is_trainable: bool) -> ModelState:
    with torch.device("meta"):
        model = Transformer(form.config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in form.frozen)
    set_trainable(model, parts, is_trainable)
    freeze_inactive_adapters(model)
    frozen = frozenset(name for name, parameter in model.named_parameters() if not parameter.requires_grad)
    return replace(form, frozen=frozen)


def _with_lora(form: ModelState, change: Callable[[Transformer], object]) -> ModelState:
    """The form after a change of its adapters, which is made on a model of copies.

    The first adapters of a model freeze what is under them where `lora_train_base` is false, as they do where
    a run begins with them.
    """
    config = form.config.model_copy(deep=True)
    weights = {name: weight.clone() for name, weight in form.weights.items()}
    model = replace(form, config=config, weights=weights).to_model()
    change(model)
    if config.lora_train_base is False and model.config.has_adapters and not form.config.has_adapters:
        train_adapters_only(model)
    made = ModelState.from_model(model)
    state = {
        name: _fitted(kept, made.weights[name])
        for name, kept in form.optimizer_state.items()
        if name in made.weights
    }
    return replace(made, optimizer_state={name: kept for name, kept in state.items() if kept})


def _fitted(state: TensorState, weight: Tensor) -> dict[str, Tensor]:
    """State of an adapter's factor whose rank has grown: what was learned of the old directions, for new ones
    none and the mean square.

    Nothing for one whose rank has shrunk: its directions are others.
    """
    fitted = {}
    for key, value in state.items():
        if not value.ndim or value.shape == weight.shape:
            fitted[key] = value
        elif any(old > new for old, new in zip(value.shape, weight.shape, strict=True)):
            return {}
        else:
            whole = torch.zeros(weight.shape, dtype=value.dtype, device=value.device)
            whole += value.mean() if key.endswith("_sq") else 0
            whole[tuple(slice(size) for size in value.shape)] = value
            fitted[key] = whole
    return fitted


def _lora_on(parts: Callable[[ModelState], list[str]]) -> Change:
    return lambda form, operation, generator: _with_rank(form, parts(form), int(operation.value), generator)


def _lora_on_one(form: ModelState, operation: Operation, generator: torch.Generator) -> ModelState:
    part, rank = operation.value
    return _with_rank(form, part, int(rank), generator)


def _with_rank(form: ModelState, parts: str | list[str], rank: int, generator: torch.Generator) -> ModelState:
    """Other ranks of the set `default`. Raises UsageError where it is there and does not count: nothing would
    be learned of it.
    """
    if DEFAULT_ADAPTER in form.config.lora and DEFAULT_ADAPTER not in form.config.active_adapter_names:
        counting = ", ".join(form.config.active_adapter_names) or "none"
        raise UsageError(
            f"the adapter {DEFAULT_ADAPTER!r}, whose ranks operations set, does not count; those that do: {counting} (active_adapters)"
        )
    return _with_lora(form, lambda model: set_lora_rank(model, parts, rank, seed=generator.initial_seed()))


def _merge(form: ModelState, operation: Operation, generator: torch.Generator) -> ModelState:
    """Adapters that are merged begin again elsewhere, so that averages of their gradients say nothing any
    more.
    """
    merged: list[str] = []
    made = _with_lora(form, lambda model: merged.extend(merge_lora(model, seed=generator.initial_seed())))
    kept = {name: one for name, one in made.optimizer_state.items() if adapter_name_of(name) not in merged}
    return replace(made, optimizer_state=kept)


MODEL_OPERATIONS: Mapping[str, Change] = {
    "stack_layers": _stack,
    "widen_mlp": _widen_mlp,
    "widen_model": _widen_model,
    "resize_vocabulary": _resize_vocabulary,
    "prune_heads": _prune(prune_heads),
    "prune_mlp": _prune(prune_mlp),
    "freeze_layer": lambda form, operation, generator: _freeze(form, operation.value, False),
    "unfreeze_layer": lambda form, operation, generator: _freeze(form, operation.value, True),
    "set_embedding_freeze_mode": lambda form, operation, generator: _freeze(form, "wte", not operation.value),
    "set_embedding_finetune_mode": lambda form, operation, generator: _freeze(
        form, "wte", bool(operation.value)
    ),
    "set_layer_lora_rank": _lora_on_one,
    "set_attn_lora_rank": _lora_on(
        lambda form: [f"attn.{layer}" for layer in range(form.config.num_hidden_layers)]
    ),
    "set_embedding_lora_rank": _lora_on(lambda form: ["wte"]),
    "merge_lora_weights": _merge,
}
"""Operation → form after it."""
