"""Activation functions of the MLP, by their names in the configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)², as in Primer (So et al. 2021, arXiv:2109.08668), in the type of `x`.

    In eager mode its gradient is written out. Autograd's gradient takes three more passes over the network's
    widest tensor, and under autocast `square` is done in fp32, with a conversion each way; together that is a
    fifth of a small model's step on a CPU.
    """
    if torch.compiler.is_compiling():
        positive = F.relu(x)
        return positive * positive
    squared: Tensor = _EagerReluSquared.apply(x)  # type: ignore[no-untyped-call]
    return squared


class _EagerReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return torch.mul(gradients[0], positive).mul_(2)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, as GPT-2 computes it.

    Compiled for a CPU it is x · sigmoid(2u), which equals x · (1 + tanh u) / 2 and takes half the time,
    because tanh is slow there.
    """
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        wide = x.float()
        gate = torch.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (wide + 0.044715 * wide**3))
        return (wide * gate).to(x.dtype)
    return F.gelu(x, approximate="tanh")


def relu(x: Tensor) -> Tensor:
    """max(x, 0).

    Compiled for a CPU it is x · sign(max(x, 0)), whose gradient is the same. For the gradient of `F.relu`,
    Inductor stores which features were positive as booleans next to bf16 values, one by one, and that takes
    six times as long as all other operations.
    """
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        return x * torch.sign(F.relu(x.detach()))
    return F.relu(x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
    "relu2": relu_squared,
    "silu": F.silu,
    "swiglu": F.silu,  # of the gate
}
