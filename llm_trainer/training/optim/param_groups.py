"""Which parameters are trained, and how fast: freezing, and learning rates by part and by depth."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

import torch

from llm_trainer.config import TrainingConfig
from llm_trainer.config.param_count import part_sizes
from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.model.adapters.lora import freeze_resting_adapters, train_adapters_only
from llm_trainer.model.adapters.nf4 import quantize_blocks
from llm_trainer.model.module_names import (
    matching_parts,
    part_names,
    part_of_parameter,
    set_trainable,
    trainable_counts,
)
from llm_trainer.model.transformer import Transformer


def prepare_trainable(model: Transformer, training: TrainingConfig) -> None:
    """Freeze what the settings say: the weights under adapters where `lora_train_base` is false, adapters that do not count, and
    `freeze_layers`; and hold what is frozen in fewer bits where `quantize_base` says so.

    Raises UsageError for a part that the model does not have, and for a base that cannot be quantised.
    """
    freeze(model, training)
    if training.quantize_base != "off":
        quantize_blocks(model)


def freeze(model: Transformer, training: TrainingConfig) -> None:
    """The part of `prepare_trainable` that takes no weights."""
    if model.config.lora_train_base is False and model.config.has_adapters:
        train_adapters_only(model)
    freeze_resting_adapters(model)
    if training.freeze_layers:
        set_trainable(model, training.freeze_layers, False)


def trained_sizes(shape: ModelConfig, training: TrainingConfig) -> dict[str, int]:
    """Trained parameters of each part, of a model that is only described."""
    tables = shape.with_lora_table()
    is_all = set(tables.lora) == set(tables.counting_lora) and (
        shape.lora_train_base or not shape.has_adapters
    )
    if is_all and not training.freeze_layers:
        return part_sizes(shape)
    with torch.device("meta"):
        model = Transformer(shape)
    freeze(model, training)
    return {part: count.trainable for part, count in trainable_counts(model).items()}


def rate_factors(model: Transformer, training: TrainingConfig) -> dict[str, float]:
    """Part → what its learning rate is multiplied by: `learning_rate_factors` of it, times `layer_rate_decay`
    for each level above it.

    Levels are the embeddings, the blocks, and the last norm with the head (Howard and Ruder 2018,
    arXiv:1801.06146). Where several spellings mean a part the last one counts. Raises UsageError for a
    spelling that means none.
    """
    factors = {
        part: training.layer_rate_decay ** (model.config.num_hidden_layers + 1 - level)
        for part, level in _levels(model).items()
    }
    said: dict[str, float] = {}
    for spelled, factor in training.learning_rate_factors.items():
        said |= dict.fromkeys(matching_parts(model, spelled), factor)
    return {part: factor * said.get(part, 1.0) for part, factor in factors.items()}


def rate_factor_of(parameter_name: str, factors: Mapping[str, float]) -> float:
    """The factor of a parameter by its name."""
    return factors.get(part_of_parameter(parameter_name), 1.0)


def _levels(model: Transformer) -> dict[str, int]:
    """Part → 0 for embeddings, 1 + its block, or one more than the blocks."""
    last = model.config.num_hidden_layers + 1

    def level(part: str) -> int:
        kind, _, number = part.partition(".")
        return 1 + int(number) if number else 0 if fnmatch.fnmatch(kind, "w?e") else last

    return {part: level(part) for part in part_names(model)}
