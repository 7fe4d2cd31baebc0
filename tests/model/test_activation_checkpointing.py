"""Activation checkpointing changes no gradient, in whichever form, compiled or not."""

from __future__ import annotations

import pytest
import torch

from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.engines.compile import compile_model, has_compiler

FORMS: list[dict[str, object]] = [
    {},
    {"checkpoint_every": 2},
    {"checkpoint_keep": ["attention"]},
    {"checkpoint_keep": ["products"]},
    {"checkpoint_keep": ["attention", "products"], "checkpoint_every": 2},
]


def _gradients(dropout: float, mode: str = "off", **changes: object) -> list[torch.Tensor]:
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 16,
    }
    model = Transformer(
        ModelConfig.model_validate({**shape, "dropout": dropout, **changes}), torch.Generator().manual_seed(0)
    ).train()
    if mode == "blocks":
        compile_model(model, "blocks")
    ids = torch.arange(32).view(2, 16)
    torch.manual_seed(7)
    model(ids).logsumexp(-1).sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradients_are_the_plain_ones(form: dict[str, object], dropout: float) -> None:
    plain = _gradients(dropout)
    saving = _gradients(dropout, gradient_checkpointing=True, **form)
    assert len(plain) == len(saving)
    for one, other in zip(plain, saving, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradients_are_the_plain_ones_when_compiled(form: dict[str, object]) -> None:
    for one, other in zip(
        _gradients(0.0), _gradients(0.0, "blocks", gradient_checkpointing=True, **form), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
