"""A model without its modules: its shape, its weights by name, and the optimizer state of each weight.

Changes of a model are functions from one model state to another. They know nothing of wrappers, ranks,
devices or compilers: training takes the state out of the model, changes it, and then builds, shards, wraps
and compiles the new model as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.model.hf.checkpoint import empty_model
from llm_trainer.model.module_names import canonical_name, unwrap_model
from llm_trainer.model.transformer import Transformer

TensorState = Mapping[str, Tensor]
"""The optimizer state of one parameter, by the optimizer's keys (`exp_avg`, `step`, …)."""


@dataclass(frozen=True)
class ModelState:
    """Shape, weights and optimizer state of a model.

    `weights` are unsharded, and a tied matrix comes once. `optimizer_state` is by parameter; parameters that
    were never updated have none. `frozen` are the parameters that are not trained; where they have optimizer
    state, it is kept until they are trained again.
    """

    config: ModelConfig
    weights: Mapping[str, Tensor]
    optimizer_state: Mapping[str, TensorState] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()

    @classmethod
    def from_model(
        cls, model: nn.Module, optimizer_state: Mapping[str, TensorState] | None = None
    ) -> ModelState:
        """The state of a model.

        Args:
            model: A transformer, wrapped or not. Its weights become those of the state, without a copy.
            optimizer_state: Optimizer state by parameter.

        Returns:
            The state.
        """
        plain = unwrap_model(model)
        named = {canonical_name(name): parameter for name, parameter in plain.named_parameters()}
        frozen = frozenset(name for name, parameter in named.items() if not parameter.requires_grad)
        weights = {name: parameter.detach() for name, parameter in named.items()}
        return cls(plain.config, weights, optimizer_state or {}, frozen)

    @torch.no_grad()
    def to_model(self) -> Transformer:
        """Build the model around the state's own tensors, in training mode."""
        first = next(iter(self.weights.values()))
        model = empty_model(self.config, "meta", first.dtype)
        wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
        have = {name: weight.shape for name, weight in self.weights.items()}
        assert have == wanted, (
            f"a model state does not fit its shape: {set(have.items()) ^ set(wanted.items())}"
        )
        for name, weight in self.weights.items():
            owner, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(weight, requires_grad=name not in self.frozen)
            setattr(model.get_submodule(owner), leaf, parameter)
        model.tie_weights()
        if model.rotary is not None:
            for name, table in list(model.rotary.named_buffers()):
                setattr(model.rotary, name, torch.empty(table.shape, dtype=first.dtype, device=first.device))
            model.rotary.reset()
        return model.train()

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""
        return sum(weight.numel() for weight in self.weights.values())
