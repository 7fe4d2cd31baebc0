"""Where and in which arithmetic the model runs.

Weights, gradients and optimizer state are always fp32: in pure bf16 small updates are rounded away. bf16 and
fp16 mean autocast, PyTorch's own choice of which operations may be narrow; fp16 adds a GradScaler, whose
state is in the checkpoint.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Literal, cast

import torch

PrecisionName = Literal["fp32", "bf16", "fp16"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """One precision on one device: the autocast context, and the scaler that fp16 needs."""

    def __init__(self, name: PrecisionName, device: torch.device) -> None:
        self.name = name
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16") if name == "fp16" else None

    @property
    def computing_dtype(self) -> torch.dtype:
        """What products are computed in."""
        return _DTYPES.get(self.name, torch.float32)

    def autocast(self) -> AbstractContextManager[object]:
        """The context of a forward pass."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=_DTYPES[self.name])

    def state_dict(self) -> dict[str, float | int]:
        """The scaler's state as plain numbers; empty without one."""
        return cast(dict[str, float | int], self.scaler.state_dict()) if self.scaler is not None else {}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Take over a scaler's state; nothing to do without one."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(dict(state))
