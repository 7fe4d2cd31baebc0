"""Optimizer state in host memory, moved to the device only for its update, a few parameters at a time.

Between updates the device then has only weights, gradients and activations. The update is the optimizer's
own and runs on the device, so the result is the same (except that Muon stacks its matrices differently). The
price is that the state crosses the bus twice per step. (Updating on the host instead, as DeepSpeed and
torchao do, transfers less but computes more slowly and rounds differently; FSDP2's own CPU offload moves the
weights as well.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

MAX_BYTES_ON_DEVICE = 256 << 20


def step_offloaded(optimizer: torch.optim.Optimizer, max_bytes: int = MAX_BYTES_ON_DEVICE) -> None:
    """Run `optimizer.step()` in parts, and leave the optimizer's state in host memory.

    Args:
        optimizer: The optimizer.
        max_bytes: The state of at most this many bytes of parameters is on the device at a time.
    """
    groups = optimizer.param_groups
    try:
        for group in groups:
            for chunk in _chunks(group["params"], max_bytes):
                for parameter in chunk:
                    _move(optimizer, parameter, parameter.device)
                optimizer.param_groups = [group | {"params": chunk}]
                optimizer.step()
                for parameter in chunk:
                    _move(optimizer, parameter, torch.device("cpu"))
    finally:
        optimizer.param_groups = groups


def _chunks(parameters: Sequence[Tensor], max_bytes: int) -> Iterator[list[Tensor]]:
    """Consecutive parameters of at most `max_bytes` together, or a single one that is larger."""
    chunk: list[Tensor] = []
    for parameter in parameters:
        if chunk and sum(one.nbytes for one in chunk) + parameter.nbytes > max_bytes:
            yield chunk
            chunk = []
        chunk.append(parameter)
    if chunk:
        yield chunk


def _move(optimizer: torch.optim.Optimizer, parameter: Tensor, device: torch.device) -> None:
    """Move a parameter's averages to `device`; counters stay where the optimizer keeps them.

    On the host they are in pinned memory, which makes the transfer back fast.
    """
    for key, value in optimizer.state.get(parameter, {}).items():
        if not isinstance(value, Tensor) or value.ndim == 0 or value.device == device:
            continue
        if device.type == "cpu":
            on_host = torch.empty_like(value, device="cpu", pin_memory=True)
            on_host.copy_(value)  # synchronous, because the source is freed right after
            optimizer.state[parameter][key] = on_host
        else:
            optimizer.state[parameter][key] = value.to(device, non_blocking=True)
