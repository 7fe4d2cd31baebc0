"""Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/) as torch.optim.Muon has it, with equal
shapes in one batch.

torch's own goes matrix by matrix; on narrow models the time is then spent on launching some thirty small
operations for each of them. Here matrices of one shape are stacked and the Newton–Schulz iteration runs on
the stack. The arithmetic is the same, so the result differs from torch's by the order of bf16 sums alone
(tests/training/test_optimizers.py states how much).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from llm_trainer.distributed.parallelize import placed_like, whole

_SMALL = 1 << 17  # elements; matrices up to this are orthogonalised together


def undecorated(function: Callable[..., Any]) -> Callable[..., Any]:
    """A method of torch's optimizers without its wrapper for compiled optimizers, which imports
    torch._dynamo: 1.4 s at a run's start.
    """
    return cast(Callable[..., Any], getattr(function, "__wrapped__", function))


class BatchedMuon(torch.optim.Muon):
    """torch.optim.Muon, computed for all matrices of one shape at once.

    `found_inf`, as in torch's fused optimizers, is a tensor that is 1 when this step's gradients are not finite and nothing may change.
    """

    found_inf: Tensor | None = None

    add_param_group = undecorated(torch.optim.Optimizer.add_param_group)
    zero_grad = undecorated(torch.optim.Optimizer.zero_grad)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "closures are for line searches; Muon has none"
        if self.found_inf is not None and bool(self.found_inf):
            return
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    rows, columns = parameter.shape
                    alike[min(rows, columns), max(rows, columns)].append(parameter)
            for shape, parameters in alike.items():
                together = len(parameters) if shape[0] * shape[1] <= _SMALL else 1
                for start in range(0, len(parameters), together):
                    self._update(parameters[start : start + together], group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update matrices of one shape, some of which may be its transpose."""
        lr, momentum = float(group["lr"]), group["momentum"]
        gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
        buffers = [self._momentum_buffer(parameter) for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, buffers, momentum) if group["nesterov"] else buffers
        updates = [whole(update) for update in updates]  # cut over ranks, a matrix has no singular values
        wide = torch.stack([(update.t() if _is_tall(update) else update).bfloat16() for update in updates])
        orthogonal = orthogonalise(wide, group["ns_coefficients"], group["ns_steps"], group["eps"])
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        for parameter, direction in zip(parameters, orthogonal, strict=True):
            rows, columns = parameter.shape
            ratio = (
                0.2 * max(rows, columns) ** 0.5
                if group["adjust_lr_fn"] == "match_rms_adamw"
                else max(1.0, rows / columns) ** 0.5
            )
            whole_direction = (direction.t() if _is_tall(parameter) else direction).to(parameter.dtype)
            parameter.add_(placed_like(whole_direction, parameter), alpha=-lr * ratio)

    def _momentum_buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return cast(Tensor, state["momentum_buffer"])


def orthogonalise(
    wide: Tensor, coefficients: tuple[float, float, float], steps: int, epsilon: float
) -> Tensor:
    """Push the singular values of each of `wide` (count, rows ≤ columns), bf16, towards 1 by Newton–Schulz,
    as torch.optim.Muon does.
    """
    a, b, c = coefficients
    x: Tensor = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=epsilon)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _is_tall(matrix: Tensor) -> bool:
    return matrix.size(0) > matrix.size(1)
