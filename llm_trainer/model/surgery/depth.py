"""More or fewer blocks, taken from those that there are.

Growing by stacking copies of trained blocks: Gong et al. 2019 (StackBERT), Du et al. 2024 (G_stack,
arXiv:2405.15319). With identity copies, whose output projections are zero, the function is kept: the second
of two equal blocks adds nothing until it has learned to (as in LLaMA Pro, Wu et al. 2024, arXiv:2401.02415).
Of adapters there only the second factor is zero, as in new ones: two factors of zero would have no gradient,
ever.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llm_trainer.config.schema.lora import LoraConfig
from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.errors import UsageError
from llm_trainer.model.surgery.model_state import Form

_OUTPUT = re.compile(r"(attn\.o_proj|mlp\.down_proj)\.(weight|bias|lora\..+\.b)|(domain_)?adapter\.up")
"""What writes into the residual stream in a block, by its name there; of two factors the second."""


def stacked_config(config: ModelConfig, sources: Sequence[int], *, identity: bool = False) -> ModelConfig:
    """The shape after `stack_layers`. Raises UsageError for sources that are no blocks, and where identity
    would not hold.
    """
    layers = config.num_hidden_layers
    if not sources or any(not 0 <= source < layers for source in sources):
        raise UsageError(
            f"stack_layers {list(sources)} names blocks that are not there: the model has blocks 0 to {layers - 1}"
        )
    if identity and not config.pre_norm:
        raise UsageError(
            "stack_layers with mode identity needs pre_norm: a norm after the sum changes what an empty block passes on"
        )
    if identity and list(dict.fromkeys(sources)) != list(range(layers)):
        raise UsageError(
            f"stack_layers {list(sources)} with mode identity leaves out or reorders blocks, which changes the function; "
            f"name each of 0 to {layers - 1} in order, copies anywhere after their source"
        )
    tables = {name: table.model_copy(update=_moved(table, sources)) for name, table in config.lora.items()}
    uneven = {
        name: [said[source] for source in sources]
        for name in ("mlp_widths", "kv_head_counts")
        if (said := getattr(config, name))
    }
    return config.model_copy(
        update={"num_hidden_layers": len(sources), **uneven, **({"lora": tables} if tables else {})}
    )


def stack_layers(form: Form, sources: Sequence[int], *, identity: bool = False) -> Form:
    """Blocks `sources` of the form, in that order, as its new blocks; copies copy optimizer state. Raises as
    `stacked_config`.

    `identity`: what every later copy writes is zero, of adapters too, so that the function stays as it was (pre-norm only).
    """
    config = stacked_config(form.config, sources, identity=identity)
    weights = {name: weight for name, weight in form.weights.items() if not name.startswith("blocks.")}
    state = {name: kept for name, kept in form.state.items() if not name.startswith("blocks.")}
    frozen = {name for name in form.frozen if not name.startswith("blocks.")}
    seen: set[int] = set()
    for place, source in enumerate(sources):
        for name, weight in form.weights.items():
            if not name.startswith(f"blocks.{source}."):
                continue
            inner = name.split(".", 2)[2]
            new, is_copy = f"blocks.{place}.{inner}", source in seen
            weights[new] = _copy(
                weight, is_copy, zero=identity and is_copy and bool(_OUTPUT.fullmatch(inner))
            )
            frozen |= {new} if name in form.frozen else set()
            if name in form.state:
                state[new] = {key: _copy(value, is_copy) for key, value in form.state[name].items()}
        seen.add(source)
    return Form(config, {name: weights[name] for name in _in_order(form, weights)}, state, frozenset(frozen))


def _moved(table: LoraConfig, sources: Sequence[int]) -> dict[str, dict[str, float]]:
    """Ranks and strengths of low-rank adapters under the blocks' new numbers."""

    def of_blocks(values: Mapping[str, float]) -> dict[str, float]:
        moved = {target: value for target, value in values.items() if "." not in target}
        for place, source in enumerate(sources):
            for target, value in values.items():
                kind, _, rest = target.partition(".")
                number, dot, projection = rest.partition(".")
                if number == str(source):
                    moved[f"{kind}.{place}{dot}{projection}"] = value
        return moved

    return {"ranks": of_blocks(table.ranks), "alphas": of_blocks(table.alphas)}


def _copy(tensor: Tensor, is_copy: bool, *, zero: bool = False) -> Tensor:
    return torch.zeros_like(tensor) if zero else tensor.clone() if is_copy else tensor


def _in_order(form: Form, weights: dict[str, Tensor]) -> list[str]:
    """What stands before the blocks in the model, the blocks, the rest."""
    before = list(form.weights)[
        : next(number for number, name in enumerate(form.weights) if name.startswith("blocks."))
    ]
    blocks = [name for name in weights if name.startswith("blocks.")]
    return [*before, *blocks, *(name for name in weights if name not in {*before, *blocks})]
