"""The names of a model's parts: `wte`, `wpe`, `ln_1.N`, `attn.N`, `ln_2.N`, `mlp.N`, `ln_f`, `lm_head`.

Freezing, LoRA, learning-rate groups, pruning, quantization and reports all use these names, and only here do
they become modules.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from llm_trainer.errors import UsageError
from llm_trainer.model.base import TransformerBase
from llm_trainer.torch_compat import strip_wrapper_names, wrapped_module

BLOCK_PARTS = ("ln_1", "attn", "ln_2", "mlp")
# After those of a block, where the model has them.
ADAPTER_PARTS = ("adapter", "domain_adapter")
# The linear maps of the parts that have some.
PROJECTIONS = {"attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


def named_parts(model: nn.Module) -> dict[str, nn.Module]:
    """Every part by name, in the order in which a token passes them.

    Args:
        model: A transformer; a compiled or otherwise wrapped one too.

    Returns:
        Name → module.
    """
    plain = unwrap_model(model)
    parts: dict[str, nn.Module] = {"wte": plain.wte}
    if plain.wpe is not None:
        parts["wpe"] = plain.wpe
    for number, block in enumerate(plain.blocks):
        parts |= {f"{kind}.{number}": getattr(block, kind) for kind in BLOCK_PARTS}
        parts |= {
            f"{kind}.{number}": part
            for kind in ADAPTER_PARTS
            if (part := getattr(block, kind, None)) is not None
        }
    if not isinstance(plain.ln_f, nn.Identity):
        parts["ln_f"] = plain.ln_f
    parts["lm_head"] = plain.lm_head
    return parts


def part_names(model: nn.Module) -> list[str]:
    """The names of the model's parts, in order."""
    return list(named_parts(model))


def resolve_part(model: nn.Module, name: str) -> nn.Module:
    """The module called `name`.

    Raises:
        UsageError: The model has no such part; the message lists the parts that it has.
    """
    parts = named_parts(model)
    if name in parts:
        return parts[name]
    close = difflib.get_close_matches(name, parts, n=2)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise UsageError(f"the model has no module {name!r}; {hint}its modules are {_summary(list(parts))}")


def matching_parts(model: nn.Module, patterns: str | Sequence[str]) -> list[str]:
    """The parts that some patterns match.

    Args:
        model: A transformer, wrapped or not.
        patterns: A name, a range (`attn.0-3`), a glob (`mlp.*`, `ln_?.0`), or a list of them.

    Returns:
        Names in the model's order.

    Raises:
        UsageError: A pattern matches no part of this model.
    """
    names = part_names(model)
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = _matches(pattern, names)
        if not found:
            resolve_part(model, pattern)  # raises, with the parts that there are
        chosen.update(found)
    return [name for name in names if name in chosen]


def _matches(pattern: str, names: Sequence[str]) -> list[str]:
    if pattern in names:
        return [pattern]
    if match := re.fullmatch(r"(\w+)\.(\d+)-(\d+)", pattern):
        kind, first, last = match[1], int(match[2]), int(match[3])
        wanted = (
            [f"{kind}.{number}" for number in range(first, last + 1)] if last - first < len(names) else []
        )
        return wanted if wanted and set(wanted) <= set(names) else []
    return fnmatch.filter(names, pattern) if set(pattern) & set("*?[") else []


def set_trainable(model: nn.Module, patterns: str | Sequence[str], is_trainable: bool) -> list[str]:
    """Freeze parts, or train them again.

    Args:
        model: A transformer, wrapped or not.
        patterns: Which parts; see `matching_parts`.
        is_trainable: True to train them, False to freeze them.

    Returns:
        Every part that this changes, including a part that is tied to one of them.

    Raises:
        UsageError: A pattern matches no part of this model.
    """
    parts = named_parts(model)
    chosen = matching_parts(model, patterns)
    touched: set[int] = set()
    for name in chosen:
        for parameter in parts[name].parameters():
            parameter.requires_grad_(is_trainable)
            touched.add(id(parameter))
    return [
        name
        for name, part in parts.items()
        if name in chosen or any(id(parameter) in touched for parameter in part.parameters())
    ]


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters are trained, and how many there are."""

    trainable: int
    total: int


def trainable_counts(model: nn.Module) -> dict[str, ParameterCount]:
    """Trained and all parameters of each part; a tied matrix counts for the first of its parts only."""
    counted: set[int] = set()
    counts: dict[str, ParameterCount] = {}
    for name, part in named_parts(model).items():
        fresh = [parameter for parameter in part.parameters() if id(parameter) not in counted]
        counted |= {id(parameter) for parameter in fresh}
        trained = sum(parameter.numel() for parameter in fresh if parameter.requires_grad)
        counts[name] = ParameterCount(trained, sum(parameter.numel() for parameter in fresh))
    return counts


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters of each part.

    A tied matrix counts for the first of its parts only, so that the sum is the model's size.
    """
    return {name: count.total for name, count in trainable_counts(model).items()}


def unwrap_model(model: nn.Module) -> TransformerBase:
    """The transformer inside the wrappers of torch.compile, DistributedDataParallel or DeepSpeed.

    Raises:
        UsageError: There is no transformer inside.
    """
    inner = model
    while not isinstance(inner, TransformerBase):
        found = wrapped_module(inner)
        if found is None:
            raise UsageError(
                f"a {type(model).__name__} holds no Transformer; pass the model, or a compiled or parallel "
                "wrapper of it"
            )
        inner = found
    return inner


def canonical_name(parameter_name: str) -> str:
    """A parameter's own name, without the names that wrappers add (`_orig_mod.`, `module.`, …)."""
    return strip_wrapper_names(parameter_name)


def part_of_parameter(parameter_name: str) -> str:
    """The part that a parameter belongs to: `blocks.3.attn.q_proj.weight` → `attn.3`."""
    pieces = canonical_name(parameter_name).split(".")
    return f"{pieces[2]}.{pieces[1]}" if pieces[0] == "blocks" else pieces[0]


def _summary(names: list[str]) -> str:
    """`attn.0 … attn.11` in place of twelve names."""
    layers = 1 + max((int(name.split(".")[1]) for name in names if "." in name), default=-1)
    kinds = [
        f"{kind}.0 … {kind}.{layers - 1}" if layers > 1 else f"{kind}.0" for kind in BLOCK_PARTS if layers
    ]
    return ", ".join([*kinds, *(name for name in names if "." not in name)])
