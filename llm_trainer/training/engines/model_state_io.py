"""Conversion between a model in training with its optimizers and a `ModelState` (`model/surgery`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llm_trainer.distributed.parallelize import distribute_like, full_tensor
from llm_trainer.model.module_names import canonical_name
from llm_trainer.model.surgery.model_state import ModelState, TensorState


def extract_state(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> ModelState:
    """Weights and optimizer state by name, as full tensors. A collective call.

    Args:
        model: The model, full or sharded.
        optimizers: Its optimizers.
    """
    optimizer_state = {
        name: {
            key: full_tensor(value.detach()) if isinstance(value, Tensor) else torch.tensor(value)
            for key, value in values.items()
        }
        for name, parameter, optimizer, _ in _optimized(model, optimizers)
        if (values := optimizer.state.get(parameter))
    }
    state = ModelState.from_model(model, optimizer_state)
    return replace(state, weights={name: full_tensor(weight) for name, weight in state.weights.items()})


def load_state(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], state: Mapping[str, TensorState]
) -> None:
    """Load optimizer state into optimizers, sharded as their parameters are.

    Args:
        model: The model, full or sharded.
        optimizers: Its optimizers.
        state: Full tensors by parameter. Parameters that no optimizer holds are ignored.
    """
    for name, parameter, optimizer, group in _optimized(model, optimizers):
        for key, value in state.get(name, {}).items():
            # torch keeps a counter of steps on the CPU, except for fused and capturable optimizers.
            on_parameter_device = value.ndim or group.get("fused") or group.get("capturable")
            value = value.to(parameter.device if on_parameter_device else "cpu")
            optimizer.state[parameter][key] = distribute_like(value, parameter) if value.ndim else value


def _optimized(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer, dict[str, Any]]]:
    """Name, parameter, optimizer and parameter group of all that optimizers hold, in the model's order."""
    holders = {
        id(parameter): (optimizer, group)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        if id(parameter) in holders:
            yield canonical_name(name), parameter, *holders[id(parameter)]
