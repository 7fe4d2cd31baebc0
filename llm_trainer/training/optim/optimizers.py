"""AdamW, or Muon for the blocks' matrices with AdamW for the rest; every trainable parameter in exactly one
group.

Weight decay is for matrices only (the embedding counts as one, as in nanoGPT); gains, biases and other
vectors are left alone. Frozen parameters are left out. Parameters whose learning rate has another factor
(trainable.py) are in groups of their own. Factors of adapters are AdamW's: Muon makes an update orthogonal,
which means something for a matrix and nothing for half of a product.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from llm_trainer.config import TrainingConfig, UsageError
from llm_trainer.distributed.parallelize import mesh_of
from llm_trainer.model.adapters.lora import is_adapter_parameter
from llm_trainer.model.module_names import unwrapped
from llm_trainer.training.optim.muon import BatchedMuon, undecorated
from llm_trainer.training.optim.param_groups import rate_factor_of, rate_factors

Named = list[tuple[str, nn.Parameter]]


class AdamW(torch.optim.AdamW):
    """torch's AdamW without its decorators for compiled optimizers: the methods are torch's own, an eager run
    starts 1.4 s sooner.
    """

    add_param_group = undecorated(torch.optim.Optimizer.add_param_group)
    zero_grad = undecorated(torch.optim.Optimizer.zero_grad)
    step = torch.no_grad()(undecorated(torch.optim.AdamW.step))


def build_optimizers(model: nn.Module, training: TrainingConfig) -> list[torch.optim.Optimizer]:
    """The run's optimizers over `model`'s trainable parameters. Raises UsageError when there are none."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise UsageError("nothing to train: every parameter is frozen")
    factors = rate_factors(unwrapped(model), training) if _differ_in_rate(training) else {}
    matrices: Named = []
    if training.optimizer == "muon":
        matrices = [
            one
            for one in named
            if one[1].ndim == 2 and ".blocks." in f".{one[0]}" and not is_adapter_parameter(one[0])
        ]
    for_muon = {id(parameter) for _, parameter in matrices}
    rest = [(name, parameter) for name, parameter in named if id(parameter) not in for_muon]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(
            BatchedMuon(
                _groups(matrices, factors, training.muon_learning_rate),
                lr=training.muon_learning_rate,
                weight_decay=training.weight_decay,
                momentum=training.muon_momentum,
            )
        )
    if rest:
        optimizers.append(_adamw(rest, training, factors))
    _assert_each_in_one_group(optimizers, [parameter for _, parameter in named])
    return optimizers


def _differ_in_rate(training: TrainingConfig) -> bool:
    return bool(training.learning_rate_factors) or training.layer_rate_decay != 1


def _groups(named: Named, factors: Mapping[str, float], rate: float) -> list[dict[str, Any]]:
    """One group for each factor and each set of ranks that parameters are cut over, in the order in which
    they come.
    """
    groups: dict[tuple[float, object], list[nn.Parameter]] = {}
    for name, parameter in named:
        groups.setdefault((rate_factor_of(name, factors), mesh_of(parameter)), []).append(parameter)
    return [{"params": parameters, "lr": rate * factor} for (factor, _), parameters in groups.items()]


def _adamw(named: Named, training: TrainingConfig, factors: Mapping[str, float]) -> AdamW:
    decayed = _groups([one for one in named if one[1].ndim >= 2], factors, training.learning_rate)
    plain = _groups([one for one in named if one[1].ndim < 2], factors, training.learning_rate)
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
    held = [
        id(parameter)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert len(held) == len(set(held)), "a parameter is in two groups"
    assert set(held) == {id(parameter) for parameter in parameters}, (
        "a parameter is in no group, or a stranger in one"
    )


def peak_rates(optimizers: Iterable[torch.optim.Optimizer]) -> list[list[float]]:
    """The rate of each group of each optimizer as built: what the schedule's factor multiplies."""
    return [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in optimizers]


def set_rates(optimizers: Iterable[torch.optim.Optimizer], peaks: list[list[float]], factor: float) -> None:
    """Give each group its peak rate times `factor`."""
    for optimizer, rates in zip(optimizers, peaks, strict=True):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
