"""Weights of a pretrained checkpoint for a model of another shape: tensors that fit are loaded, and a report
lists where every parameter came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from llm_trainer.errors import CheckpointError
from llm_trainer.model.hf.checkpoint import load_pretrained
from llm_trainer.model.module_names import matching_parts, part_of_parameter, unwrap_model


@dataclass(frozen=True)
class TransferReport:
    """What was loaded from a checkpoint.

    `loaded` are the model's parameters that were loaded, `skipped` those that were not, with the reason, and
    `unused` the checkpoint's parameters that the model did not take.
    """

    source: Path
    loaded: tuple[str, ...]
    skipped: dict[str, str]
    unused: tuple[str, ...]

    def lines(self) -> list[str]:
        """The report for the console: one line for what was loaded, and one for each reason for skipping."""
        parts = list(dict.fromkeys(part_of_parameter(name) for name in self.loaded))
        lines = [
            f"loaded {len(self.loaded)} tensors of {len(parts)} parts from {self.source}: {', '.join(parts)}"
        ]
        for reason in dict.fromkeys(self.skipped.values()):
            names = [name for name, why in self.skipped.items() if why == reason]
            lines.append(f"  not loaded, {reason}: {', '.join(names)}")
        return lines + ([f"  unused tensors of the source: {', '.join(self.unused)}"] if self.unused else [])


@torch.no_grad()
def load_partially(model: nn.Module, source: Path, parts: str | Sequence[str] = ("*",)) -> TransferReport:
    """Load the tensors of a checkpoint that have the name and the shape of one of the model's.

    Args:
        model: A transformer, wrapped or not; its other parameters stay as they are.
        source: A model folder.
        parts: The parts to load; see `module_names.matching_parts`.

    Returns:
        What was loaded and what was not.

    Raises:
        CheckpointError: Nothing fits, or the source cannot be read.
        UsageError: The model has no such part.
    """
    plain = unwrap_model(model)
    wanted = set(matching_parts(plain, parts))
    available = dict(load_pretrained(source).named_parameters())
    loaded: list[str] = []
    skipped: dict[str, str] = {}
    for name, parameter in plain.named_parameters():
        if part_of_parameter(name) not in wanted:
            skipped[name] = "not selected"
        elif name not in available:
            skipped[name] = "missing in the source"
        elif available[name].shape != parameter.shape:
            shapes = f"{tuple(available[name].shape)} in the source, {tuple(parameter.shape)} in the model"
            skipped[name] = f"shape {shapes}"
        else:
            parameter.copy_(available[name])
            loaded.append(name)
    if not loaded:
        reasons = [f"{name} ({why})" for name, why in skipped.items() if why != "not selected"]
        more = ", …" if len(reasons) > 3 else ""
        raise CheckpointError(
            f"no tensor of {source} fits this model: {', '.join(reasons[:3]) or 'none is selected'}{more}; "
            "change the model's shape or transfer_modules"
        )
    unused = tuple(name for name in available if name not in loaded)
    return TransferReport(source, tuple(loaded), skipped, unused)
