"""Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/) as in torch.optim.Muon, batched by shape.

torch's implementation updates one matrix after another; on narrow models the time is then spent on launching
some thirty small operations per matrix. Here matrices of the same shape are stacked and the Newton–Schulz
iteration runs on the stack. The arithmetic is the same, so the result differs from torch's only by the order
of bf16 sums (tests/training/optim/test_optimizers.py states by how much).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from llm_trainer.distributed.parallelize import distribute_like, full_tensor
from llm_trainer.torch_compat import foreach_lerp, foreach_lerp_, foreach_mul_

_MAX_STACKED_ELEMENTS = 1 << 17  # matrices of up to this many elements are stacked


def undecorated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of torch's optimizers without its wrapper for compiled optimizers.

    The wrapper imports torch._dynamo, which takes 1.4 s at the start of a run.
    """
    return cast(Callable[..., Any], getattr(function, "__wrapped__", function))


class BatchedMuon(torch.optim.Muon):
    """torch.optim.Muon, computed for all matrices of one shape at once.

    Attributes:
        found_inf: As in torch's fused optimizers, a tensor that is 1 if this step's gradients are not finite,
            in which case nothing is updated.
    """

    found_inf: Tensor | None = None

    add_param_group = undecorated(torch.optim.Optimizer.add_param_group)
    zero_grad = undecorated(torch.optim.Optimizer.zero_grad)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "Muon does no line search, so it takes no closure"
        if self.found_inf is not None and bool(self.found_inf):
            return
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    rows, columns = parameter.shape
                    by_shape[min(rows, columns), max(rows, columns)].append(parameter)
            for shape, parameters in by_shape.items():
                stack_size = len(parameters) if shape[0] * shape[1] <= _MAX_STACKED_ELEMENTS else 1
                for start in range(0, len(parameters), stack_size):
                    self._update(parameters[start : start + stack_size], group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update matrices of one shape or its transpose."""
        lr, momentum = float(group["lr"]), group["momentum"]
        gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
        buffers = [self._momentum_buffer(parameter) for parameter in parameters]
        foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = foreach_lerp(gradients, buffers, momentum) if group["nesterov"] else buffers
        updates = [
            full_tensor(update) for update in updates
        ]  # a shard does not have the matrix's singular values
        wide = torch.stack([(update.t() if _is_tall(update) else update).bfloat16() for update in updates])
        orthogonal = orthogonalize(wide, group["ns_coefficients"], group["ns_steps"], group["eps"])
        foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        for parameter, direction in zip(parameters, orthogonal, strict=True):
            rows, columns = parameter.shape
            ratio = (
                0.2 * max(rows, columns) ** 0.5
                if group["adjust_lr_fn"] == "match_rms_adamw"
                else max(1.0, rows / columns) ** 0.5
            )
            full_direction = (direction.t() if _is_tall(parameter) else direction).to(parameter.dtype)
            parameter.add_(distribute_like(full_direction, parameter), alpha=-lr * ratio)

    def _momentum_buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return cast(Tensor, state["momentum_buffer"])


def orthogonalize(
    wide: Tensor, coefficients: tuple[float, float, float], steps: int, epsilon: float
) -> Tensor:
    """Push the singular values of matrices towards 1 by the Newton–Schulz iteration of torch.optim.Muon.

    Args:
        wide: The matrices, (count, rows ≤ columns), bf16.
        coefficients: The coefficients of the iteration's polynomial.
        steps: The number of iterations.
        epsilon: The smallest norm by which a matrix is divided.
    """
    a, b, c = coefficients
    x: Tensor = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=epsilon)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _is_tall(matrix: Tensor) -> bool:
    return matrix.size(0) > matrix.size(1)
