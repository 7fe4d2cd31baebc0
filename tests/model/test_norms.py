"""The fast RMSNorm equals PyTorch's own, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from llm_trainer.model.norms import RMSNorm, rms_norm


@pytest.mark.parametrize("shape", [(3, 7, 32), (2, 5, 4, 16), (9, 8), (1, 1, 32)])
def test_values_and_gradients_equal_pytorchs(shape):
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    weight = torch.randn(shape[-1], generator=generator)
    results = []
    for norm in (lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: F.rms_norm(x, w.shape, w, 1e-5)):
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        output = norm(*inputs)
        results.append((output, *torch.autograd.grad(output, inputs, gradient)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_gradient_that_is_not_contiguous_is_accepted():
    x = torch.randn(4, 6, 8, requires_grad=True)
    weight = torch.randn(8)
    (ours,) = torch.autograd.grad(rms_norm(x, weight, 1e-5).transpose(0, 1).cumsum(0).sum(), x)
    (theirs,) = torch.autograd.grad(F.rms_norm(x, (8,), weight, 1e-5).transpose(0, 1).cumsum(0).sum(), x)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_result_has_the_type_of_the_input():
    norm = RMSNorm(8, 1e-5)
    assert norm(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert norm(torch.randn(3, 8)).dtype == torch.float32
