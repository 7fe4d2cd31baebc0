"""Activations whose gradients are written by hand agree with autograd's."""

from __future__ import annotations

import pytest
import torch

from llm_trainer.model.activations import relu_squared


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 0.0), (torch.float32, 0.0), (torch.bfloat16, 2**-7)])
def test_relu_squared_and_its_gradient_are_autograds(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(4, 33, generator=generator).to(dtype).requires_grad_()
    plain = ours.detach().clone().requires_grad_()
    above = torch.randn(4, 33, generator=generator).to(dtype)
    relu_squared(ours).backward(above)
    torch.relu(plain).square().backward(above)
    assert ours.grad is not None
    torch.testing.assert_close(relu_squared(ours), torch.relu(plain).square(), rtol=tolerance, atol=0)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=tolerance, atol=0)


def test_relu_squared_stays_in_its_type_under_autocast() -> None:
    x = torch.randn(3, 5, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert relu_squared(x).dtype == torch.bfloat16
