"""Activations whose gradients are written by hand agree with autograd's."""

from __future__ import annotations

import pytest
import torch

from llm_trainer.model.activations import ACTIVATIONS, relu_squared


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 0.0), (torch.float32, 0.0), (torch.bfloat16, 2**-7)]
)
def test_relu_squared_and_its_gradient_equal_autograds(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(4, 33, generator=generator).to(dtype).requires_grad_()
    plain = ours.detach().clone().requires_grad_()
    upstream = torch.randn(4, 33, generator=generator).to(dtype)
    relu_squared(ours).backward(upstream)
    torch.relu(plain).square().backward(upstream)
    assert ours.grad is not None
    torch.testing.assert_close(relu_squared(ours), torch.relu(plain).square(), rtol=tolerance, atol=0)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=tolerance, atol=0)


def test_relu_squared_stays_in_its_type_under_autocast() -> None:
    x = torch.randn(3, 5, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert relu_squared(x).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["relu", "relu2", "gelu_tanh"])
def test_compiled_activations_and_gradients_equal_the_eager_ones(name: str, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0] = 0
    eager, compiled = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, found = ACTIVATIONS[name](eager), torch.compile(ACTIVATIONS[name])(compiled)
    expected.backward(x)
    found.backward(x)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(found, expected, **close)
    torch.testing.assert_close(compiled.grad, eager.grad, **close)
