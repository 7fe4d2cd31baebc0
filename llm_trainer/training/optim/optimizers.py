"""Builds the optimizers: AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest.

Every trainable parameter is in exactly one parameter group. Weight decay applies to matrices only (the
embedding counts as one, as in nanoGPT), not to norm weights, biases and other vectors. Frozen parameters are
left out. Parameters with another learning-rate multiplier (param_groups.py) have groups of their own. The
factors of LoRA adapters always use AdamW: Muon orthogonalises an update, which makes sense for a matrix but
not for one factor of a product.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from llm_trainer.config import TrainingConfig, UsageError
from llm_trainer.distributed.parallelize import device_mesh_of
from llm_trainer.model.adapters.lora import is_adapter_parameter
from llm_trainer.model.module_names import unwrap_model
from llm_trainer.training.optim.muon import BatchedMuon, undecorated
from llm_trainer.training.optim.param_groups import lr_multiplier_of, module_lr_multipliers

NamedParameters = list[tuple[str, nn.Parameter]]


class AdamW(torch.optim.AdamW):
    """torch's AdamW without its wrappers for compiled optimizers; an eager run starts 1.4 s sooner."""

    add_param_group = undecorated(torch.optim.Optimizer.add_param_group)
    zero_grad = undecorated(torch.optim.Optimizer.zero_grad)
    step = torch.no_grad()(undecorated(torch.optim.AdamW.step))


def build_optimizers(model: nn.Module, training: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Return the optimizers over a model's trainable parameters.

    Args:
        model: The model, already sharded, since the optimizers keep references to its parameters.
        training: The settings.

    Raises:
        UsageError: The model has no trainable parameters.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise UsageError(
            "there is nothing to train: every parameter is frozen; set freeze_layers to fewer layers"
        )
    multipliers = (
        module_lr_multipliers(unwrap_model(model), training) if _has_lr_multipliers(training) else {}
    )
    matrices: NamedParameters = []
    if training.optimizer == "muon":
        matrices = [
            one
            for one in named
            if one[1].ndim == 2 and ".blocks." in f".{one[0]}" and not is_adapter_parameter(one[0])
        ]
    muon_ids = {id(parameter) for _, parameter in matrices}
    rest = [(name, parameter) for name, parameter in named if id(parameter) not in muon_ids]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(
            BatchedMuon(
                _groups(matrices, multipliers, training.muon_learning_rate),
                lr=training.muon_learning_rate,
                weight_decay=training.weight_decay,
                momentum=training.muon_momentum,
            )
        )
    if rest:
        optimizers.append(_adamw(rest, training, multipliers))
    _assert_each_in_one_group(optimizers, [parameter for _, parameter in named])
    return optimizers


def _has_lr_multipliers(training: TrainingConfig) -> bool:
    return bool(training.lr_multipliers) or training.layerwise_lr_decay != 1


def _groups(named: NamedParameters, multipliers: Mapping[str, float], lr: float) -> list[dict[str, Any]]:
    """One group per multiplier and per mesh that parameters are sharded over, in order of appearance."""
    groups: dict[tuple[float, object], list[nn.Parameter]] = {}
    for name, parameter in named:
        groups.setdefault((lr_multiplier_of(name, multipliers), device_mesh_of(parameter)), []).append(
            parameter
        )
    return [{"params": parameters, "lr": lr * multiplier} for (multiplier, _), parameters in groups.items()]


def _adamw(named: NamedParameters, training: TrainingConfig, multipliers: Mapping[str, float]) -> AdamW:
    decayed = _groups([one for one in named if one[1].ndim >= 2], multipliers, training.learning_rate)
    plain = _groups([one for one in named if one[1].ndim < 2], multipliers, training.learning_rate)
    return AdamW(
        [{**group, "weight_decay": training.weight_decay} for group in decayed]
        + [{**group, "weight_decay": 0.0} for group in plain],
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        fused=True,
    )


def _assert_each_in_one_group(
    optimizers: Iterable[torch.optim.Optimizer], parameters: list[nn.Parameter]
) -> None:
    grouped = [
        id(parameter)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert len(grouped) == len(set(grouped)), "a parameter is in two groups"
    assert set(grouped) == {id(parameter) for parameter in parameters}, (
        "a parameter is in no group, or a group has one that is not trainable"
    )


def peak_lrs(optimizers: Iterable[torch.optim.Optimizer]) -> list[list[float]]:
    """Return the peak learning rate of each group of each new optimizer, which the schedule multiplies."""
    return [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in optimizers]


def set_lrs(optimizers: Iterable[torch.optim.Optimizer], peaks: list[list[float]], factor: float) -> None:
    """Set the learning rate of each group to its peak times `factor`.

    Args:
        optimizers: The optimizers.
        peaks: The result of `peak_lrs`.
        factor: The schedule's factor at this step.
    """
    for optimizer, peak_of_groups in zip(optimizers, peaks, strict=True):
        for group, peak in zip(optimizer.param_groups, peak_of_groups, strict=True):
            group["lr"] = peak * factor
