"""The names of a model's parts: `wte`, `wpe`, `ln_1.N`, `attn.N`, `ln_2.N`, `mlp.N`, `ln_f`, `lm_head`.

Freezing, LoRA, learning-rate groups, pruning, quantisation and reports all speak these names, and only here
do they become modules.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from llm_trainer.errors import UsageError
from llm_trainer.model.transformer import Transformer

BLOCK_PARTS = ("ln_1", "attn", "ln_2", "mlp")
# Behind them, where the model has them.
ADAPTER_PARTS = ("adapter", "domain_adapter")


def named_parts(model: nn.Module) -> dict[str, nn.Module]:
    """Every part by name, in the order in which a token passes them. Takes a compiled or otherwise wrapped
    model too.
    """
    plain = unwrapped(model)
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
    """The names that `resolve_part` knows for this model."""
    return list(named_parts(model))


def resolve_part(model: nn.Module, name: str) -> nn.Module:
    """The module called `name`; raises UsageError with the valid names for any other."""
    parts = named_parts(model)
    if name in parts:
        return parts[name]
    close = difflib.get_close_matches(name, parts, n=2)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise UsageError(f"the model has no part {name!r}; {hint}its parts are {_summary(list(parts))}")


def matching_parts(model: nn.Module, wanted: str | Sequence[str]) -> list[str]:
    """The names that `wanted` means, in the model's order: names, ranges (`attn.0-3`), globs (`mlp.*`,
    `ln_?.0`), or a list of them.

    Raises UsageError for one that means no part of this model.
    """
    names = part_names(model)
    chosen: set[str] = set()
    for spelled in [wanted] if isinstance(wanted, str) else wanted:
        found = _matches(spelled, names)
        if not found:
            resolve_part(model, spelled)  # says what there is
        chosen.update(found)
    return [name for name in names if name in chosen]


def _matches(spelled: str, names: Sequence[str]) -> list[str]:
    if spelled in names:
        return [spelled]
    if match := re.fullmatch(r"(\w+)\.(\d+)-(\d+)", spelled):
        kind, first, last = match[1], int(match[2]), int(match[3])
        wanted = (
            [f"{kind}.{number}" for number in range(first, last + 1)] if last - first < len(names) else []
        )
        return wanted if wanted and set(wanted) <= set(names) else []
    return fnmatch.filter(names, spelled) if set(spelled) & set("*?[") else []


def set_trainable(model: nn.Module, wanted: str | Sequence[str], is_trainable: bool) -> list[str]:
    """Freeze parts, or let them be trained again; returns every part that this changes, a part that shares a
    matrix with them included.
    """
    parts = named_parts(model)
    chosen = matching_parts(model, wanted)
    touched: set[int] = set()
    for name in chosen:
        for parameter in parts[name].parameters():
            parameter.requires_grad_(is_trainable)
            touched.add(id(parameter))
    return [
        name
        for name, part in parts.items()
        if name in chosen or any(id(one) in touched for one in part.parameters())
    ]


def frozen_parts(model: nn.Module) -> list[str]:
    """The parts of which nothing is trained."""
    return [
        name
        for name, part in named_parts(model).items()
        if not any(parameter.requires_grad for parameter in part.parameters())
    ]


@dataclass(frozen=True)
class Count:
    """Parameters that are trained, and all."""

    trainable: int
    total: int


def trainable_counts(model: nn.Module) -> dict[str, Count]:
    """Trained and all parameters of each part; what two parts share counts for the first one only."""
    counted: set[int] = set()
    counts: dict[str, Count] = {}
    for name, part in named_parts(model).items():
        fresh = [parameter for parameter in part.parameters() if id(parameter) not in counted]
        counted |= {id(parameter) for parameter in fresh}
        trained = sum(parameter.numel() for parameter in fresh if parameter.requires_grad)
        counts[name] = Count(trained, sum(parameter.numel() for parameter in fresh))
    return counts


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters of each part; a matrix that two parts share counts for the first one only, so that the sum
    is the model's size.
    """
    return {name: count.total for name, count in trainable_counts(model).items()}


def unwrapped(model: nn.Module) -> Transformer:
    """The Transformer inside torch.compile's and DistributedDataParallel's wrappers; raises UsageError where
    there is none.
    """
    inner = model
    while not isinstance(inner, Transformer):
        found = getattr(inner, "_orig_mod", getattr(inner, "module", None))
        if not isinstance(found, nn.Module):
            raise UsageError(
                f"a {type(model).__name__} holds no Transformer; pass the model, or a compiled or parallel wrapper of it"
            )
        inner = found
    return inner


def plain_name(parameter_name: str) -> str:
    """A parameter's own name without what wrappers put before or into it (`_orig_mod.`, `module.`,
    `_checkpoint_wrapped_module.`).
    """
    return re.sub(r"(^|(?<=\.))(_orig_mod|module|_checkpoint_wrapped_module)\.", "", parameter_name)


def part_of_parameter(parameter_name: str) -> str:
    """The part that a parameter belongs to: `blocks.3.attn.q_proj.weight` → `attn.3`, `wte.weight` → `wte`."""
    pieces = plain_name(parameter_name).split(".")
    return f"{pieces[2]}.{pieces[1]}" if pieces[0] == "blocks" else pieces[0]


def _summary(names: list[str]) -> str:
    """`attn.0 … attn.11` in place of twelve names."""
    layers = 1 + max((int(name.split(".")[1]) for name in names if "." in name), default=-1)
    kinds = [
        f"{kind}.0 … {kind}.{layers - 1}" if layers > 1 else f"{kind}.0" for kind in BLOCK_PARTS if layers
    ]
    return ", ".join([*kinds, *(name for name in names if "." not in name)])
