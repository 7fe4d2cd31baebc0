"""Weights of a pretrained checkpoint for a model that is not quite that one: what fits is taken, and a report
says what came from where.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from llm_trainer.errors import CheckpointError
from llm_trainer.model.hf.checkpoint import load_pretrained
from llm_trainer.model.module_names import matching_parts, part_of_parameter, unwrapped


@dataclass(frozen=True)
class TransferReport:
    """Names of the model's parameters that were taken, of those that stayed as they were, with the reason,
    and what was not needed.
    """

    source: Path
    taken: tuple[str, ...]
    kept: dict[str, str]
    unused: tuple[str, ...]

    def lines(self) -> list[str]:
        """For a person: a line for what was taken by part, and one for each reason why others stayed."""
        parts = list(dict.fromkeys(part_of_parameter(name) for name in self.taken))
        said = [f"from {self.source}: {len(self.taken)} tensors of {len(parts)} parts ({', '.join(parts)})"]
        for reason in dict.fromkeys(self.kept.values()):
            names = [name for name, why in self.kept.items() if why == reason]
            said.append(f"  as they were, {reason}: {', '.join(names)}")
        return said + ([f"  not needed: {', '.join(self.unused)}"] if self.unused else [])


@torch.no_grad()
def load_partially(model: nn.Module, source: Path, parts: str | Sequence[str] = ("*",)) -> TransferReport:
    """Copy the tensors of `source` that have the name and the shape of one of the model's, in these parts;
    the others stay.

    Raises CheckpointError where nothing fits or `source` cannot be read, UsageError for parts that the model
    does not have.
    """
    plain = unwrapped(model)
    wanted = set(matching_parts(plain, parts))
    there = {name: parameter for name, parameter in load_pretrained(source).named_parameters()}
    taken: list[str] = []
    kept: dict[str, str] = {}
    for name, parameter in plain.named_parameters():
        if part_of_parameter(name) not in wanted:
            kept[name] = "not asked for"
        elif name not in there:
            kept[name] = "not in the source"
        elif there[name].shape != parameter.shape:
            kept[name] = f"{tuple(there[name].shape)} there and {tuple(parameter.shape)} here"
        else:
            parameter.copy_(there[name])
            taken.append(name)
    if not taken:
        raise CheckpointError(
            f"no tensor of {source} fits this model; {'; '.join(dict.fromkeys(kept.values()))}"
        )
    return TransferReport(source, tuple(taken), kept, tuple(name for name in there if name not in taken))
