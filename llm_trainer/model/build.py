"""A new model with seeded weights."""

from __future__ import annotations

import torch

from llm_trainer.config import ModelConfig
from llm_trainer.model.transformer import Transformer


def build_model(config: ModelConfig, seed: int) -> Transformer:
    """Build a model and initialize its weights.

    Args:
        config: The shape.
        seed: Seed of the initial weights.

    Returns:
        The model. If it has adapters and `lora_train_base` is not set, the base is trained too, because
        its weights are random.
    """
    model = Transformer(config, torch.Generator().manual_seed(seed))
    if model.config.has_adapters and model.config.lora_train_base is None:
        model.config.lora_train_base = True
    return model
