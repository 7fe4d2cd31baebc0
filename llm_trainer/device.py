"""Which device a command runs on: the one place that turns `--device` into a torch device.

Training and inference both use it, so it is below both. It imports nothing of the package but `errors`.
"""

from __future__ import annotations

import torch

from llm_trainer.errors import UsageError

SUPPORTED = ("cpu", "cuda", "mps")


def resolve_device(name: str) -> torch.device:
    """The torch device that a user's device name means.

    Args:
        name: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`. `auto` is the first of cuda, mps and cpu that is
            available.

    Returns:
        The device. For `auto` on a machine with GPUs it is the current CUDA device.

    Raises:
        UsageError: The name is no device, the kind of device is not supported, or this machine does not have
            it.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name!r} is not supported; choose cpu, cuda or mps") from error
    if device.type not in SUPPORTED:
        raise UsageError(f"device {name!r} is not supported; choose cpu, cuda or mps")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UsageError(
            f"device {name!r} is not available: PyTorch finds {count} CUDA devices on this machine; "
            "choose another one, or auto"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("device 'mps' is not available on this machine; choose cpu or auto")
    return device
