"""Linear maps of one input, fused to one product in training, give the results of each alone."""

from __future__ import annotations

import pytest
import torch

from llm_trainer.model.layers import Linear, fused_linears


def _maps(bias: bool) -> list[Linear]:
    maps = [Linear(8, out, bias=bias) for out in (8, 4, 6)]
    for linear in maps:
        for parameter in linear.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    return maps


@pytest.mark.parametrize("bias", [True, False])
def test_fused_maps_give_the_outputs_and_gradients_of_each_alone(bias: bool) -> None:
    maps, x = _maps(bias), torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    parameters = [parameter for linear in maps for parameter in linear.parameters()]
    fused = fused_linears(x, maps)
    alone = [linear(x) for linear in maps]
    for together, single in zip(fused, alone, strict=True):
        torch.testing.assert_close(together, single)
    ours = torch.autograd.grad(sum(y.square().sum() for y in fused), parameters)
    theirs = torch.autograd.grad(sum(y.square().sum() for y in alone), parameters)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_the_hook_of_a_map_is_called() -> None:
    maps, x = _maps(bias=False), torch.ones(1, 8)
    maps[1].register_forward_hook(lambda _module, _arguments, output: output * 0 + 7)
    assert (fused_linears(x, maps)[1] == 7).all()


def test_a_frozen_map_gets_no_gradient_and_the_others_do() -> None:
    maps, x = _maps(bias=False), torch.ones(1, 8)
    maps[0].weight.requires_grad_(False)
    sum(y.sum() for y in fused_linears(x, maps)).backward()
    assert maps[0].weight.grad is None
    assert maps[1].weight.grad is not None
