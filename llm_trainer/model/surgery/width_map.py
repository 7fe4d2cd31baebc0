"""What each axis of each parameter counts, and the one way in which all changes of width are sewn.

A change says, for some spaces (the residual stream, a block's heads, its MLP's units, the vocabulary), which
old entry each new entry is taken from. Whatever writes into a space is copied with its entries; whatever
reads from one is divided by the number of copies, so that sums over the space stay as they were and the
function with them (Net2Wider: Chen et al. 2016, arXiv:1511.05641). Taking a part of the entries is the same
thing without copies.

Copies that are equal and read equally would get equal gradients for ever. Net2Wider adds noise, which changes
the function; here the readers of copies differ by noise that sums to zero over the copies, which does not.

Optimizer state follows as gradients do. Of c copies that are read with weight 1/c each gets 1/c of the
gradient, and the readers get the whole of it; averages of gradients are mapped by that factor, averages of
their squares by its square.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.model.surgery.model_state import Form

MEAN = -1
"""In an index: no old entry, but the mean of all of them."""

# Parameter in a block → (space, does it read) for each axis; None: an axis that no change touches.
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
# Averages of gradients follow by the gradient's factor to this power; other tensors of a parameter's shape
# (none today) by the first.
_POWERS = {"exp_avg_sq": 2, "max_exp_avg_sq": 2}

Changes = Mapping[tuple[int | None, str], Tensor]
"""(block or None for all, space) → for each new entry the old one it comes from (int64), or MEAN."""


class Sewing(NamedTuple):
    """How one axis changes: where entries come from, what weights and gradients are multiplied by, and
    whether it reads copies.
    """

    source: Tensor
    weight: Tensor
    gradient: Tensor
    is_reader: bool


def sew(
    form: Form,
    config: ModelConfig,
    changes: Changes,
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> Form:
    """The form of shape `config` in which entries of spaces are taken, copied and divided as `changes` say.

    `noise` times the standard deviation of each matrix is how much the readers of copies differ; drawn on the CPU, alike everywhere.
    """
    weights: dict[str, Tensor] = {}
    state: dict[str, dict[str, Tensor]] = {}
    for name, weight in form.weights.items():
        sewings = [_sewing(axis, _block_of(name), changes) for axis in _axes(name, form.config)]
        weights[name] = _applied(weight, sewings, power=None)
        if noise:
            weights[name] = _with_noise(weights[name], sewings, noise, generator)
        if name in form.state:
            shape, kept = weight.shape, form.state[name]
            state[name] = {
                key: _applied(value, sewings, power=_POWERS.get(key, 1))
                if value.shape == shape and value.ndim
                else value
                for key, value in kept.items()
            }
    return replace(form, config=config, weights=weights, state=state)


def spread(old: int, new: int, unit: int = 1) -> Tensor:
    """An index that lays the old entries one after the other, again and again, until there are `new`; entries
    move in groups of `unit`.
    """
    groups = torch.arange(new // unit) % (old // unit)
    return (groups[:, None] * unit + torch.arange(unit)).flatten()


def _block_of(name: str) -> int | None:
    return int(name.split(".")[1]) if name.startswith("blocks.") else None


def _axes(name: str, config: ModelConfig) -> tuple[Axis, ...]:
    """The axes of a parameter; the factors b (out, rank) and a (rank, in) of a low-rank adapter have one each
    of their matrix.

    Under tied embeddings the matrix writes copies, so what the head reads is divided in the last norm; what
    comes after that, as bottlenecks do where norms come after the sums, reads what is divided and writes it
    divided.
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
    if config.pre_norm:
        return ("ln_f.",)
    return tuple(
        f"blocks.{config.num_hidden_layers - 1}.{part}." for part in ("ln_2", "adapter", "domain_adapter")
    )


def _sewing(axis: Axis, block: int | None, changes: Changes) -> Sewing | None:
    if axis is None:
        return None
    space, is_reader = axis
    index = changes.get((block, space), changes.get((None, space)))
    if index is None:
        return None
    taken = index.clamp(min=0)
    copies = torch.where(
        index == MEAN, 1, torch.bincount(index[index != MEAN], minlength=int(taken.max()) + 1)[taken]
    ).double()
    ones = torch.ones_like(copies)
    return Sewing(index, 1 / copies if is_reader else ones, ones if is_reader else 1 / copies, is_reader)


def _applied(tensor: Tensor, sewings: list[Sewing | None], power: int | None) -> Tensor:
    """A weight (power None) or an average of gradients to a power, sewn along each axis."""
    for axis, sewing in enumerate(sewings):
        if sewing is None:
            continue
        taken = tensor.index_select(axis, sewing.source.clamp(min=0).to(tensor.device))
        if bool((sewing.source == MEAN).any()):
            taken.index_copy_(
                axis,
                (sewing.source == MEAN).nonzero().flatten().to(tensor.device),
                _means(tensor, axis, sewing.source),
            )
        factor = sewing.weight if power is None else sewing.gradient**power
        if bool((factor != 1).any()):
            shape = [1] * tensor.ndim
            shape[axis] = -1
            taken = taken * factor.to(tensor.device, tensor.dtype).view(shape)
        tensor = taken
    return tensor


def _means(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
    shape = list(tensor.shape)
    shape[axis] = int((index == MEAN).sum())
    return tensor.mean(axis, keepdim=True).expand(shape)


def _with_noise(
    weight: Tensor, sewings: list[Sewing | None], noise: float, generator: torch.Generator | None
) -> Tensor:
    """The matrix with noise along the axis that reads copies, which sums to zero over the copies of each
    entry.
    """
    for axis, sewing in enumerate(sewings):
        if (
            sewing is None
            or not sewing.is_reader
            or weight.ndim < 2
            or weight.is_meta
            or bool((sewing.weight == 1).all())
        ):
            continue
        drawn = (
            torch.randn(weight.shape, generator=generator, dtype=torch.float64) * float(weight.std()) * noise
        )
        index, count = sewing.source, int(sewing.source.max()) + 1
        sums = torch.zeros(
            *drawn.shape[:axis], count, *drawn.shape[axis + 1 :], dtype=drawn.dtype
        ).index_add_(axis, index, drawn)
        shape = [1] * weight.ndim
        shape[axis] = -1
        drawn -= sums.index_select(axis, index) * sewing.weight.view(shape)
        weight = weight + drawn.to(weight.device, weight.dtype)
    return weight
