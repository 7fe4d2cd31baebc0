"""Optimizer state that lies in host memory and visits the device for its update only, some parameters at a
time.

Between updates the device then holds weights, gradients and activations only. The update itself is the
optimizer's own, on the device, so the result is the same (Muon's products are made in other batches); the
price is that the state crosses the bus twice a step. (Updating on the host instead, as DeepSpeed and torchao
do, sends less and computes slower, with another rounding; FSDP2's own CPU offload moves the weights as well.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BYTES_AT_ONCE = 256 << 20


def step_offloaded(optimizer: torch.optim.Optimizer, bytes_at_once: int = BYTES_AT_ONCE) -> None:
    """`optimizer.step()`, with the state of at most so many bytes of parameters on the device at a time, and
    in host memory after it.
    """
    groups = optimizer.param_groups
    try:
        for group in groups:
            for some in _portions(group["params"], bytes_at_once):
                for parameter in some:
                    _move(optimizer, parameter, parameter.device)
                optimizer.param_groups = [group | {"params": some}]
                optimizer.step()
                for parameter in some:
                    _move(optimizer, parameter, torch.device("cpu"))
    finally:
        optimizer.param_groups = groups


def _portions(parameters: Sequence[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Runs of parameters of at most `limit` bytes, or of one that is larger."""
    some: list[Tensor] = []
    for parameter in parameters:
        if some and sum(one.nbytes for one in some) + parameter.nbytes > limit:
            yield some
            some = []
        some.append(parameter)
    if some:
        yield some


def _move(optimizer: torch.optim.Optimizer, parameter: Tensor, device: torch.device) -> None:
    """Bring a parameter's averages to `device`; counters stay where the optimizer keeps them. To the host
    through pinned memory, which is what makes the way back fast.
    """
    for key, value in optimizer.state.get(parameter, {}).items():
        if not isinstance(value, Tensor) or value.ndim == 0 or value.device == device:
            continue
        if device.type == "cpu":
            kept = torch.empty_like(value, device="cpu", pin_memory=True)
            kept.copy_(value)  # waits: what it was copied from is let go of now
            optimizer.state[parameter][key] = kept
        else:
            optimizer.state[parameter][key] = value.to(device, non_blocking=True)
