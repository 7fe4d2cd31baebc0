"""A model apart from its modules: a shape, weights by name, and the optimizer's state of each weight.

Changes of a model are functions from one form to another. They know nothing of wrappers, ranks, devices or
compilers: whoever trains takes the model apart into its form, changes that, and builds, cuts, wraps and
compiles the result as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.model.hf.checkpoint import empty_model
from llm_trainer.model.module_names import plain_name, unwrapped
from llm_trainer.model.transformer import Transformer

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Form:
    """`weights` are whole and come once where they are tied; `state` is by parameter, then by the optimizer's
    key (`exp_avg`, `step`, …).

    Parameters without state (never updated, frozen from the start) are missing in `state`. `frozen` are the
    names of those that are not trained; where they have state, it rests until they are.
    """

    config: ModelConfig
    weights: Mapping[str, Tensor]
    state: Mapping[str, State] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()

    @property
    def parameters(self) -> int:
        """Numbers in all weights."""
        return sum(weight.numel() for weight in self.weights.values())


def form_of(model: nn.Module, state: Mapping[str, State] | None = None) -> Form:
    """The form of a model whose weights are whole; its tensors are the model's own, not copies."""
    plain = unwrapped(model)
    named = {plain_name(name): parameter for name, parameter in plain.named_parameters()}
    frozen = frozenset(name for name, parameter in named.items() if not parameter.requires_grad)
    return Form(
        plain.config, {name: parameter.detach() for name, parameter in named.items()}, state or {}, frozen
    )


@torch.no_grad()
def build(form: Form) -> Transformer:
    """The model of a form, in training mode, around the form's own tensors."""
    first = next(iter(form.weights.values()))
    model = empty_model(form.config, "meta", first.dtype)
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    have = {name: weight.shape for name, weight in form.weights.items()}
    assert have == wanted, f"a form does not fit its shape: {set(have.items()) ^ set(wanted.items())}"
    for name, weight in form.weights.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=name not in form.frozen))
    model.tie_weights()
    if model.rotary is not None:
        for name, table in list(model.rotary.named_buffers()):
            setattr(model.rotary, name, torch.empty(table.shape, dtype=first.dtype, device=first.device))
        model.rotary.reset()
    return model.train()
