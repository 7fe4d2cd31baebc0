"""The arithmetic in which the model computes.

Weights, gradients and optimizer state are always fp32: in pure bf16 small updates are rounded away. bf16 and
fp16 mean autocast, with PyTorch's own choice of the operations that may use fewer bits. fp16 adds a
GradScaler, whose state is in the checkpoint.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Literal, cast

import torch

PrecisionName = Literal["fp32", "bf16", "fp16"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """One precision on one device.

    Args:
        name: fp32, bf16 or fp16.
        device: Where the model computes.

    Attributes:
        scaler: The gradient scaler that fp16 needs; None for other precisions.
    """

    def __init__(self, name: PrecisionName, device: torch.device) -> None:
        self.name = name
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16") if name == "fp16" else None

    @property
    def computing_dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        return _DTYPES.get(self.name, torch.float32)

    def autocast(self) -> AbstractContextManager[object]:
        """The context manager for a forward pass."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=_DTYPES[self.name])

    def state_dict(self) -> dict[str, float | int]:
        """The scaler's state as plain numbers; empty without a scaler."""
        return cast(dict[str, float | int], self.scaler.state_dict()) if self.scaler is not None else {}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Restore what `state_dict` returned. Does nothing without a scaler."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(dict(state))
