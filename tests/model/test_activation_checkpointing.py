"""Activation checkpointing changes no gradient, with any policy, compiled or not."""

from __future__ import annotations

import pytest
import torch

from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.engines.compile import compile_model, has_compiler

SETTINGS: list[dict[str, object]] = [
    {},
    {"activation_checkpoint_every": 2},
    {"activation_checkpoint_policy": ["attention"]},
    {"activation_checkpoint_policy": ["matmul"]},
    {"activation_checkpoint_policy": ["attention", "matmul"], "activation_checkpoint_every": 2},
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


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradients_equal_those_without_checkpointing(settings: dict[str, object], dropout: float) -> None:
    plain = _gradients(dropout)
    saving = _gradients(dropout, gradient_checkpointing=True, **settings)
    assert len(plain) == len(saving)
    for one, other in zip(plain, saving, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_compiled_gradients_equal_those_without_checkpointing(settings: dict[str, object]) -> None:
    for one, other in zip(
        _gradients(0.0), _gradients(0.0, "blocks", gradient_checkpointing=True, **settings), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
