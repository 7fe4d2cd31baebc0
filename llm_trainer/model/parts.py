"""The names of a model's parts: `wte`, `wpe`, `ln_1.N`, `attn.N`, `ln_2.N`, `mlp.N`, `ln_f`, `lm_head`.

Freezing, LoRA, learning-rate groups, pruning, quantisation and reports all speak these names, and only here do they become modules.
"""

from __future__ import annotations

import difflib
import re

from torch import nn

from llm_trainer.config.errors import UsageError
from llm_trainer.model.transformer import Transformer

BLOCK_PARTS = ("ln_1", "attn", "ln_2", "mlp")


def named_parts(model: nn.Module) -> dict[str, nn.Module]:
    """Every part by name, in the order in which a token passes them. Takes a compiled or otherwise wrapped model too."""
    plain = unwrapped(model)
    parts: dict[str, nn.Module] = {"wte": plain.wte}
    if plain.wpe is not None:
        parts["wpe"] = plain.wpe
    for number, block in enumerate(plain.blocks):
        parts |= {f"{kind}.{number}": getattr(block, kind) for kind in BLOCK_PARTS}
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


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters of each part; a matrix that two parts share counts for the first one only, so that the sum is the model's size."""
    counted: set[int] = set()
    counts: dict[str, int] = {}
    for name, part in named_parts(model).items():
        fresh = {id(parameter): parameter.numel() for parameter in part.parameters() if id(parameter) not in counted}
        counted |= fresh.keys()
        counts[name] = sum(fresh.values())
    return counts


def unwrapped(model: nn.Module) -> Transformer:
    """The Transformer inside torch.compile's and DistributedDataParallel's wrappers; raises UsageError where there is none."""
    inner = model
    while not isinstance(inner, Transformer):
        found = getattr(inner, "_orig_mod", getattr(inner, "module", None))
        if not isinstance(found, nn.Module):
            raise UsageError(f"a {type(model).__name__} holds no Transformer; pass the model, or a compiled or parallel wrapper of it")
        inner = found
    return inner


def plain_name(parameter_name: str) -> str:
    """A parameter's own name without what wrappers put before or into it (`_orig_mod.`, `module.`, `_checkpoint_wrapped_module.`)."""
    return re.sub(r"(^|(?<=\.))(_orig_mod|module|_checkpoint_wrapped_module)\.", "", parameter_name)


def part_of_parameter(parameter_name: str) -> str:
    """The part that a parameter belongs to: `blocks.3.attn.q_proj.weight` → `attn.3`, `wte.weight` → `wte`."""
    pieces = plain_name(parameter_name).split(".")
    return f"{pieces[2]}.{pieces[1]}" if pieces[0] == "blocks" else pieces[0]


def _summary(names: list[str]) -> str:
    """`attn.0 … attn.11` in place of twelve names."""
    layers = 1 + max((int(name.split(".")[1]) for name in names if "." in name), default=-1)
    kinds = [f"{kind}.0 … {kind}.{layers - 1}" if layers > 1 else f"{kind}.0" for kind in BLOCK_PARTS if layers]
    return ", ".join([*kinds, *(name for name in names if "." not in name)])
