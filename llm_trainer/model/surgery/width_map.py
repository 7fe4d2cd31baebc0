"""What each axis of each parameter counts, and the one way in which all changes of width are made.

A change gives, for some spaces (the residual stream, a block's heads, its MLP's units, the vocabulary), which
old entry each new entry is taken from. A matrix that writes into a space is copied with the entries of the
space. A matrix that reads from one is divided by the number of copies, so that sums over the space stay as
they were, and the function with them (Net2Wider: Chen et al. 2016, arXiv:1511.05641). Taking a part of the
entries is the same operation without copies.

Copies that are equal and are read equally would get equal gradients for ever. Net2Wider adds noise, which
changes the function. Here the readers of copies differ by noise that sums to zero over the copies, which does
not.

Optimizer state is transformed as gradients are. Of c copies that are read with weight 1/c, each gets 1/c of
the gradient, and the readers get all of it. Averages of gradients are multiplied by that factor, averages of
their squares by its square.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.model.surgery.model_state import ModelState

# In an index: no old entry, but the mean of all of them.
MEAN = -1

# Parameter in a block → (space, whether it reads from it) for each axis. None: an axis that no change
# affects.
_WRITES_HIDDEN, _READS_HIDDEN = ("hidden", False), ("hidden", True)
Axis = tuple[str, bool] | None
_IN_BLOCK: dict[str, tuple[Axis, ...]] = {
    **{
        f"attn.{name}_proj.weight": ((space, False), _READS_HIDDEN)
        for name, space in (("q", "heads"), ("k", "kv"), ("v", "kv"))
    },
    **{
        f"attn.{name}_proj.bias": ((space, False),)
        for name, space in (("q", "heads"), ("k", "kv"), ("v", "kv"))
    },
    "attn.o_proj.weight": (_WRITES_HIDDEN, ("heads", True)),
    "attn.o_proj.bias": (_WRITES_HIDDEN,),
    "attn.q_norm.weight": (None,),
    "attn.k_norm.weight": (None,),
    **{f"mlp.{name}_proj.weight": (("mlp", False), _READS_HIDDEN) for name in ("up", "gate")},
    **{f"mlp.{name}_proj.bias": (("mlp", False),) for name in ("up", "gate")},
    "mlp.down_proj.weight": (_WRITES_HIDDEN, ("mlp", True)),
    "mlp.down_proj.bias": (_WRITES_HIDDEN,),
    **{f"{norm}.{name}": (_WRITES_HIDDEN,) for norm in ("ln_1", "ln_2") for name in ("weight", "bias")},
    **{f"{adapter}.down": (None, None, _READS_HIDDEN) for adapter in ("adapter", "domain_adapter")},
    **{f"{adapter}.up": (None, _WRITES_HIDDEN, None) for adapter in ("adapter", "domain_adapter")},
}
_OUTSIDE: dict[str, tuple[Axis, ...]] = {
    "wte.weight": (("vocabulary", False), _WRITES_HIDDEN),
    "wpe.weight": (None, _WRITES_HIDDEN),
    "ln_f.weight": (_WRITES_HIDDEN,),
    "ln_f.bias": (_WRITES_HIDDEN,),
    "lm_head.weight": (("vocabulary", False), _READS_HIDDEN),
}
# Averages of gradients are multiplied by the gradient's factor to this power; other tensors of a parameter's
# shape (there are none today) by the factor itself.
_POWERS = {"exp_avg_sq": 2, "max_exp_avg_sq": 2}

# (block or None for all, space) → for each new entry the old one that it is taken from (int64), or MEAN.
Changes = Mapping[tuple[int | None, str], Tensor]


class AxisMap(NamedTuple):
    """How one axis changes.

    `source` is the old entry of each new one, `weight` and `gradient` are the factors of weights and
    gradients, and `is_reader` says whether the axis reads from its space.
    """

    source: Tensor
    weight: Tensor
    gradient: Tensor
    is_reader: bool


def remap(
    state: ModelState,
    config: ModelConfig,
    changes: Changes,
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> ModelState:
    """Take, copy and divide the entries of spaces.

    Args:
        state: The present model.
        config: The shape of the new one.
        changes: The old entry of each new entry, by block and space.
        noise: How much the readers of copies differ, in standard deviations of each matrix. It is drawn on
            the CPU, so that it is the same on every device.
        generator: Source of the noise. None: torch's global one.

    Returns:
        The new model.
    """
    weights: dict[str, Tensor] = {}
    optimizer_state: dict[str, dict[str, Tensor]] = {}
    for name, weight in state.weights.items():
        maps = [_axis_map(axis, _block_of(name), changes) for axis in _axes(name, state.config)]
        weights[name] = _mapped(weight, maps, power=None)
        if noise:
            weights[name] = _with_noise(weights[name], maps, noise, generator)
        if name in state.optimizer_state:
            shape, kept = weight.shape, state.optimizer_state[name]
            optimizer_state[name] = {
                key: _mapped(value, maps, power=_POWERS.get(key, 1))
                if value.shape == shape and value.ndim
                else value
                for key, value in kept.items()
            }
    return replace(state, config=config, weights=weights, optimizer_state=optimizer_state)


def repeat_index(old: int, new: int, unit: int = 1) -> Tensor:
    """An index that repeats the old entries in order until there are `new`.

    Args:
        old: Number of old entries.
        new: Number of new entries.
        unit: Entries move in groups of this size.

    Returns:
        For each new entry the old one, (new,) int64.
    """
    groups = torch.arange(new // unit) % (old // unit)
    return (groups[:, None] * unit + torch.arange(unit)).flatten()


def _block_of(name: str) -> int | None:
    return int(name.split(".")[1]) if name.startswith("blocks.") else None


def _axes(name: str, config: ModelConfig) -> tuple[Axis, ...]:
    """The axes of a parameter.

    The factors b (out, rank) and a (rank, in) of a low-rank adapter have one axis each of their matrix. Under
    tied embeddings the matrix writes copies, so that what the head reads is divided in the last norm. What
    comes after that norm, as bottleneck adapters do in a post-norm model, reads divided values and writes
    them divided.
    """
    matrix, adapter, factor = name.partition(".lora.")
    if adapter:
        out, into = _axes(f"{matrix}.weight", config)
        return (out, None) if factor.endswith(".b") else (None, into)
    axes = _IN_BLOCK[name.split(".", 2)[2]] if name.startswith("blocks.") else _OUTSIDE[name]
    if config.tie_word_embeddings and name.startswith(_from_last_norm(config)):
        return tuple(axis and (axis[0], not axis[1]) for axis in axes)
    return axes


def _from_last_norm(config: ModelConfig) -> tuple[str, ...]:
    """Prefixes of the parameters from the last norm on."""
    if config.pre_norm:
        return ("ln_f.",)
    return tuple(
        f"blocks.{config.num_hidden_layers - 1}.{part}." for part in ("ln_2", "adapter", "domain_adapter")
    )


def _axis_map(axis: Axis, block: int | None, changes: Changes) -> AxisMap | None:
    if axis is None:
        return None
    space, is_reader = axis
    index = changes.get((block, space), changes.get((None, space)))
    if index is None:
        return None
    source = index.clamp(min=0)
    counts = torch.bincount(index[index != MEAN], minlength=int(source.max()) + 1)
    copies = torch.where(index == MEAN, 1, counts[source]).double()
    ones = torch.ones_like(copies)
    return AxisMap(index, 1 / copies if is_reader else ones, ones if is_reader else 1 / copies, is_reader)


def _mapped(tensor: Tensor, maps: list[AxisMap | None], power: int | None) -> Tensor:
    """A weight (power None), or an average of gradients to a power, remapped along each axis."""
    for axis, axis_map in enumerate(maps):
        if axis_map is None:
            continue
        is_mean = axis_map.source == MEAN
        taken = tensor.index_select(axis, axis_map.source.clamp(min=0).to(tensor.device))
        if bool(is_mean.any()):
            entries = is_mean.nonzero().flatten().to(tensor.device)
            taken.index_copy_(axis, entries, _means(tensor, axis, int(is_mean.sum())))
        factor = axis_map.weight if power is None else axis_map.gradient**power
        if bool((factor != 1).any()):
            shape = [1] * tensor.ndim
            shape[axis] = -1
            taken = taken * factor.to(tensor.device, tensor.dtype).view(shape)
        tensor = taken
    return tensor


def _means(tensor: Tensor, axis: int, count: int) -> Tensor:
    shape = list(tensor.shape)
    shape[axis] = count
    return tensor.mean(axis, keepdim=True).expand(shape)


def _with_noise(
    weight: Tensor, maps: list[AxisMap | None], noise: float, generator: torch.Generator | None
) -> Tensor:
    """The matrix with noise along the axis that reads copies; its sum over the copies of an entry is zero."""
    if weight.ndim < 2 or weight.is_meta:
        return weight
    for axis, axis_map in enumerate(maps):
        if axis_map is None or not axis_map.is_reader or bool((axis_map.weight == 1).all()):
            continue
        drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        drawn = drawn * float(weight.std()) * noise
        index, count = axis_map.source, int(axis_map.source.max()) + 1
        sums_shape = (*drawn.shape[:axis], count, *drawn.shape[axis + 1 :])
        sums = torch.zeros(sums_shape, dtype=drawn.dtype).index_add_(axis, index, drawn)
        shape = [1] * weight.ndim
        shape[axis] = -1
        drawn -= sums.index_select(axis, index) * axis_map.weight.view(shape)
        weight = weight + drawn.to(weight.device, weight.dtype)
    return weight
