"""More or fewer blocks, taken from those that there are.

Growing by stacking copies of trained blocks: Gong et al. 2019 (StackBERT), Du et al. 2024 (G_stack,
arXiv:2405.15319). With identity copies, whose output projections are zero, the function is kept: the second
of two equal blocks adds nothing until it has learned to (as in LLaMA Pro, Wu et al. 2024, arXiv:2401.02415).
Of the adapters in such a copy only the second factor is zero, as in new ones; with two factors of zero they
would never have a gradient.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llm_trainer.config.schema.lora import LoraConfig
from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.errors import UsageError
from llm_trainer.model.surgery.model_state import ModelState

# What writes into the residual stream in a block, by its name there; of two factors the second.
_OUTPUT = re.compile(r"(attn\.o_proj|mlp\.down_proj)\.(weight|bias|lora\..+\.b)|(domain_)?adapter\.up")


def stacked_config(config: ModelConfig, sources: Sequence[int], *, identity: bool = False) -> ModelConfig:
    """The shape after `stack_layers`.

    Args:
        config: The present shape.
        sources: The present block that each new block is taken from.
        identity: Whether the function is to be kept.

    Returns:
        The new shape.

    Raises:
        UsageError: A source is no block of the model, or with `identity` the function would change.
    """
    layers = config.num_hidden_layers
    if not sources or any(not 0 <= source < layers for source in sources):
        raise UsageError(
            f"stack_layers {list(sources)} names blocks that do not exist: the model has "
            f"blocks 0 to {layers - 1}"
        )
    if identity and not config.pre_norm:
        raise UsageError(
            "stack_layers with mode identity needs pre_norm: a norm after the sum changes what a block of "
            "zeros passes on"
        )
    if identity and list(dict.fromkeys(sources)) != list(range(layers)):
        raise UsageError(
            f"stack_layers {list(sources)} with mode identity leaves out or reorders blocks, which changes "
            f"the function; name each of 0 to {layers - 1} in order, copies anywhere after their source"
        )
    tables = {
        name: table.model_copy(update=_renumbered(table, sources)) for name, table in config.lora.items()
    }
    per_block = {
        name: [sizes[source] for source in sources]
        for name in ("mlp_hidden_sizes", "kv_heads_per_layer")
        if (sizes := getattr(config, name))
    }
    return config.model_copy(
        update={"num_hidden_layers": len(sources), **per_block, **({"lora": tables} if tables else {})}
    )


def stack_layers(state: ModelState, sources: Sequence[int], *, identity: bool = False) -> ModelState:
    """Make a model of some of its own blocks, in any order and number; copies copy optimizer state as well.

    Args:
        state: The present model.
        sources: The present block that each new block is taken from.
        identity: Set what every later copy writes to zero, of adapters too, so that the function is kept.

    Returns:
        The new model.

    Raises:
        UsageError: As `stacked_config`.
    """
    config = stacked_config(state.config, sources, identity=identity)
    weights = {name: weight for name, weight in state.weights.items() if not name.startswith("blocks.")}
    optimizer_state = {
        name: kept for name, kept in state.optimizer_state.items() if not name.startswith("blocks.")
    }
    frozen = {name for name in state.frozen if not name.startswith("blocks.")}
    used: set[int] = set()
    for number, source in enumerate(sources):
        for name, weight in state.weights.items():
            if not name.startswith(f"blocks.{source}."):
                continue
            inner = name.split(".", 2)[2]
            new, is_copy = f"blocks.{number}.{inner}", source in used
            is_zero = identity and is_copy and bool(_OUTPUT.fullmatch(inner))
            weights[new] = _copy(weight, is_copy, zero=is_zero)
            frozen |= {new} if name in state.frozen else set()
            if name in state.optimizer_state:
                kept = state.optimizer_state[name]
                optimizer_state[new] = {key: _copy(value, is_copy) for key, value in kept.items()}
        used.add(source)
    ordered = {name: weights[name] for name in _in_order(state, weights)}
    return ModelState(config, ordered, optimizer_state, frozenset(frozen))


def _renumbered(table: LoraConfig, sources: Sequence[int]) -> dict[str, dict[str, float]]:
    """Ranks and alphas of low-rank adapters under the blocks' new numbers."""

    def renumber(values: Mapping[str, float]) -> dict[str, float]:
        renumbered = {target: value for target, value in values.items() if "." not in target}
        for new, source in enumerate(sources):
            for target, value in values.items():
                kind, _, rest = target.partition(".")
                number, dot, projection = rest.partition(".")
                if number == str(source):
                    renumbered[f"{kind}.{new}{dot}{projection}"] = value
        return renumbered

    return {"ranks": renumber(table.ranks), "alphas": renumber(table.alphas)}


def _copy(tensor: Tensor, is_copy: bool, *, zero: bool = False) -> Tensor:
    return torch.zeros_like(tensor) if zero else tensor.clone() if is_copy else tensor


def _in_order(state: ModelState, weights: dict[str, Tensor]) -> list[str]:
    """Names in the model's order: what comes before the blocks, the blocks, the rest."""
    first_block = next(number for number, name in enumerate(state.weights) if name.startswith("blocks."))
    before = list(state.weights)[:first_block]
    blocks = [name for name in weights if name.startswith("blocks.")]
    return [*before, *blocks, *(name for name in weights if name not in {*before, *blocks})]
