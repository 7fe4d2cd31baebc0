"""A model in training taken apart into a form (`model/surgery`), and a form's optimizer state given to
optimizers.
"""

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
    """Weights and optimizer state by name, gathered where they are cut over ranks (a collective call, alike
    on all).
    """
    state = {
        name: {
            key: full_tensor(value.detach()) if isinstance(value, Tensor) else torch.tensor(value)
            for key, value in kept.items()
        }
        for name, parameter, optimizer, _ in _held(model, optimizers)
        if (kept := optimizer.state.get(parameter))
    }
    form = ModelState.from_model(model, state)
    return replace(form, weights={name: full_tensor(weight) for name, weight in form.weights.items()})


def load_state(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], state: Mapping[str, TensorState]
) -> None:
    """Give the optimizers the state of the parameters that they hold; what is said of others is left out."""
    for name, parameter, optimizer, group in _held(model, optimizers):
        for key, value in state.get(name, {}).items():
            is_beside = (
                value.ndim or group.get("fused") or group.get("capturable")
            )  # where torch keeps a counter
            held = value.to(parameter.device if is_beside else "cpu")
            optimizer.state[parameter][key] = distribute_like(held, parameter) if value.ndim else held


def _held(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer, dict[str, Any]]]:
    """Name, parameter, optimizer and group of everything that is held, in the model's order."""
    holders = {
        id(one): (optimizer, group)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for one in group["params"]
    }
    for name, parameter in model.named_parameters():
        if id(parameter) in holders:
            yield canonical_name(name), parameter, *holders[id(parameter)]
