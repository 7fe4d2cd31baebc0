"""Eager attention equals attention by the fused kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llm_trainer.model.attention import attention, eager_attention
from llm_trainer.model.positional import sequence_mask


def _inputs(kv_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, heads, 24, 8, generator=generator).to(dtype).requires_grad_()
        for heads in (4, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("packed", [False, True])
def test_eager_attention_equals_the_fused_kernel_forward_and_backward(kv_heads: int, packed: bool) -> None:
    documents = torch.arange(24).div(7, rounding_mode="floor").expand(2, 24) if packed else None
    mask = sequence_mask(24, None, documents, torch.device("cpu"), torch.float32)
    results = []
    for function in (eager_attention, attention):
        inputs = _inputs(kv_heads, torch.float32)
        output = function(*inputs, mask)
        output.square().sum().backward()
        results.append([output.detach(), *(x.grad for x in inputs)])
    for mine, fused in zip(*results, strict=True):
        torch.testing.assert_close(mine, fused, rtol=1e-5, atol=1e-5)


def test_bf16_training_on_a_cpu_stays_within_bf16_of_fp32() -> None:
    exact = F.scaled_dot_product_attention(*_inputs(4, torch.float32), is_causal=True)
    rounded = attention(*_inputs(4, torch.bfloat16), None)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=0.03)
