"""Which parameters are trained, and how fast: freezing, and learning rates by module and by depth."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

import torch

from llm_trainer.config import TrainingConfig
from llm_trainer.config.param_count import params_per_module
from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.model.adapters.lora import freeze_inactive_adapters, train_adapters_only
from llm_trainer.model.adapters.nf4 import quantize_base
from llm_trainer.model.base import TransformerBase
from llm_trainer.model.module_names import (
    matching_parts,
    part_names,
    part_of_parameter,
    set_trainable,
    trainable_counts,
)
from llm_trainer.model.transformer import Transformer


def prepare_trainable(model: Transformer, training: TrainingConfig) -> None:
    """Freeze parameters as configured, and quantize the frozen base model where `quantize_base` is set.

    Frozen are the weights under adapters if `lora_train_base` is false, inactive adapters, and the modules of
    `freeze_layers`.

    Raises:
        UsageError: `freeze_layers` names a module that the model does not have, or the base cannot be
            quantized.
    """
    freeze_parameters(model, training)
    if training.quantize_base != "off":
        quantize_base(model)


def freeze_parameters(model: Transformer, training: TrainingConfig) -> None:
    """Freeze parameters like `prepare_trainable`; works on the meta device too."""
    if model.config.lora_train_base is False and model.config.has_adapters:
        train_adapters_only(model)
    freeze_inactive_adapters(model)
    if training.freeze_layers:
        set_trainable(model, training.freeze_layers, False)


def trainable_sizes(config: ModelConfig, training: TrainingConfig) -> dict[str, int]:
    """Return the number of trainable parameters of each module, without building the model's weights."""
    with_tables = config.with_lora_tables()
    trains_all = set(with_tables.lora) == set(with_tables.active_adapter_names) and (
        config.lora_train_base or not config.has_adapters
    )
    if trains_all and not training.freeze_layers:
        return params_per_module(config)
    with torch.device("meta"):
        model = Transformer(config)
    freeze_parameters(model, training)
    return {module: count.trainable for module, count in trainable_counts(model).items()}


def module_lr_multipliers(model: TransformerBase, training: TrainingConfig) -> dict[str, float]:
    """Return what the learning rate of each module is multiplied by.

    This is its entry in `lr_multipliers`, times `layerwise_lr_decay` for each level above the module. Levels
    are the embeddings, each block, and the final norm with the head (Howard and Ruder 2018,
    arXiv:1801.06146). If several entries match a module, the last one applies.

    Raises:
        UsageError: An entry of `lr_multipliers` matches no module.
    """
    by_depth = {
        module: training.layerwise_lr_decay ** (model.config.num_hidden_layers + 1 - level)
        for module, level in _levels(model).items()
    }
    requested: dict[str, float] = {}
    for pattern, multiplier in training.lr_multipliers.items():
        requested |= dict.fromkeys(matching_parts(model, pattern), multiplier)
    return {module: factor * requested.get(module, 1.0) for module, factor in by_depth.items()}


def lr_multiplier_of(parameter_name: str, multipliers: Mapping[str, float]) -> float:
    """Return the multiplier of a parameter, given its name and the multipliers of all modules."""
    return multipliers.get(part_of_parameter(parameter_name), 1.0)


def _levels(model: TransformerBase) -> dict[str, int]:
    """Module → its level: 0 for embeddings, 1 + the number of its block, and the last for norm and head."""
    last = model.config.num_hidden_layers + 1

    def level(module: str) -> int:
        kind, _, number = module.partition(".")
        return 1 + int(number) if number else 0 if fnmatch.fnmatch(kind, "w?e") else last

    return {module: level(module) for module in part_names(model)}
