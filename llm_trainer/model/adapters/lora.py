"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on attention, MLP, embedding and head, in named sets.

A matrix W (out, in) with adapters computes x·Wᵀ + scale · (x·Aᵀ)·Bᵀ for each active set, A (rank, in) and B
(out, rank). The matrix stays the module's own `weight` under its own name, so that files, optimizers and
fused products (`layers.fused_linears`) see the same model with parameters added to it. Embedding and head
have the same two factors over (V, C). Where they are tied, they share one adapter as well, so that merging
keeps both functions.

`model.config.lora` names the adapters that there are and `model.config.active_adapters` those that are
active. Every function here keeps both true: the shape of a checkpoint is its config.json, and whoever builds
the model again builds the same function. New factors A are drawn from a seed that is the adapter's name and a
number, so that all ranks draw the same ones. New columns of B are zero, so that the function does not change.
Adapters that restart after a merge should take another number, because they are meant to read other
directions than before (ReLoRA: Lialin et al. 2023, arXiv:2307.05695).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm_trainer.config.schema.lora import DEFAULT_ADAPTER, LoraConfig
from llm_trainer.errors import UsageError
from llm_trainer.model.adapters.lora_layers import (
    LoraEmbedding,
    LoraFactors,
    LoraLinear,
    LoraModule,
    lora_factors,
)
from llm_trainer.model.base import TransformerBase
from llm_trainer.model.layers import Embedding, Linear
from llm_trainer.model.module_names import PROJECTIONS, matching_parts, unwrap_model

EMBEDDINGS = ("wte", "lm_head")


@dataclass(frozen=True)
class LoraTarget:
    """A matrix that can have adapters.

    `name` is its name (`attn.2.q_proj`, `wte`); `owner` is the module that has it, as its attribute
    `attribute`.
    """

    name: str
    owner: nn.Module
    attribute: str

    @property
    def module(self) -> nn.Linear | nn.Embedding:
        """The linear map or embedding."""
        found = getattr(self.owner, self.attribute)
        assert isinstance(found, (nn.Linear, nn.Embedding))
        return found

    def with_adapters(self) -> LoraModule:
        """The module, replaced by one that can carry adapters where it is not one yet."""
        module = self.module
        if isinstance(module, (LoraLinear, LoraEmbedding)):
            return module
        made = LoraEmbedding(module) if isinstance(module, nn.Embedding) else LoraLinear(module)
        setattr(self.owner, self.attribute, made)
        return made

    def remove_wrapper(self) -> None:
        """Replace a module whose last adapter was removed by a plain one."""
        module = self.module
        if isinstance(module, LoraEmbedding):
            bare: nn.Module = Embedding(module.num_embeddings, module.embedding_dim, device="meta")
        elif isinstance(module, LoraLinear):
            bare = Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            bare.bias = module.bias
        else:
            return
        bare.weight = module.weight
        bare.training = module.training
        setattr(self.owner, self.attribute, bare)


def lora_targets(model: nn.Module) -> list[LoraTarget]:
    """Every matrix of the model that can have adapters, in order."""
    plain = unwrap_model(model)
    found = [LoraTarget("wte", plain, "wte")]
    for number, block in enumerate(plain.blocks):
        for kind, names in PROJECTIONS.items():
            part = getattr(block, kind)
            found += [
                LoraTarget(f"{kind}.{number}.{name}", part, name)
                for name in names
                if getattr(part, name, None) is not None
            ]
    return [*found, LoraTarget("lm_head", plain, "lm_head")]


def inject_adapters(model: TransformerBase) -> None:
    """Give a new model the adapters that its configuration names, and activate those that it lists as active.

    Raises:
        UsageError: The configuration names a target that does not exist or an active set that is not there.
    """
    for name, table in model.config.lora.items():
        check_adapter(model, name, table)
        for target in lora_targets(model):
            _resize(model, target, name, table)
    _activate(model, model.config.active_adapter_names)


def check_adapter(model: nn.Module, name: str, table: LoraConfig) -> None:
    """Check a set of adapters before it is added.

    Args:
        model: A transformer, wrapped or not.
        name: The set's name.
        table: Its ranks by target.

    Raises:
        UsageError: The name, a target or a rank is invalid.
    """
    if not name or "." in name:
        raise UsageError(f"invalid adapter name {name!r}: give a name without a dot")
    known = {target.name for target in lora_targets(model)} | {
        target.name.rpartition(".")[0] for target in lora_targets(model)
    }
    for wanted, rank in table.ranks.items():
        if wanted not in known or not wanted:
            raise UsageError(
                f"LoRA cannot be applied to {wanted!r}; give attn.N, mlp.N, one of their projections "
                "(attn.0.q_proj), wte or lm_head"
            )
        if rank < 0:
            raise UsageError(f"invalid LoRA rank {rank} for {wanted}: a rank is 0 or more")


def set_lora_rank(
    model: nn.Module, parts: str | Sequence[str], rank: int, *, name: str = DEFAULT_ADAPTER, seed: int = 0
) -> list[str]:
    """Give parts adapters of another rank.

    A larger rank keeps the adapter's product up to rounding, a smaller one keeps its largest singular values,
    and 0 merges and removes it. New adapters are trained; whether the matrices under them are is left as it
    is.

    Args:
        model: A transformer, wrapped or not.
        parts: Names, ranges or globs of `attn.N`, `mlp.N`, `wte` and `lm_head`.
        rank: The new rank.
        name: The set of adapters.
        seed: Seed of what is drawn.

    Returns:
        The parts that were changed, including a part that is tied to one of them.

    Raises:
        UsageError: A part does not exist or takes no adapter, or the rank is negative.
    """
    plain = unwrap_model(model)
    chosen = matching_parts(plain, parts)
    invalid = [part for part in chosen if part not in EMBEDDINGS and part.split(".")[0] not in PROJECTIONS]
    if invalid:
        raise UsageError(
            f"LoRA cannot be applied to {', '.join(invalid)}; only attn.N, mlp.N, wte and lm_head have "
            "matrices for it"
        )
    if rank < 0:
        raise UsageError(f"invalid LoRA rank {rank}: a rank is 0 or more")
    if plain.config.tie_word_embeddings and set(chosen) & set(EMBEDDINGS):
        chosen = list(dict.fromkeys([*chosen, *EMBEDDINGS]))  # one matrix, one adapter
    recorded = [part for part in chosen if part != "lm_head"] if plain.config.tie_word_embeddings else chosen
    active = active_adapters(plain) + ([name] if name not in plain.config.lora else [])
    table = _table_or_new(plain, name)
    ranks = {key: value for key, value in table.ranks.items() if not _is_within(key, chosen)}
    changed = table.model_copy(update={"ranks": ranks | dict.fromkeys(recorded, rank)})
    for target in lora_targets(plain):
        if _is_within(target.name, chosen):
            _resize(plain, target, name, changed, seed)
    _record(plain, name, changed)
    set_adapters(plain, [each for each in active if each in plain.config.lora])
    return chosen


def merge_lora(
    model: nn.Module, names: Sequence[str] | None = None, *, restart: bool = True, seed: int = 0
) -> list[str]:
    """Merge adapters into the matrices.

    Args:
        model: A transformer, wrapped or not.
        names: The sets to merge. None: those that are active.
        restart: Draw new adapters, at zero, after merging; otherwise remove them.
        seed: Seed of what is drawn.

    Returns:
        The sets that were merged.

    Raises:
        UsageError: The model has no such set.
    """
    plain = unwrap_model(model)
    chosen = active_adapters(plain) if names is None else list(names)
    for name in chosen:
        _require(plain, name)
    for target, module, name in _modules_with(plain, chosen):
        if not _is_tied_head(plain, target):
            _merge(module, name)
    for target, module, name in _modules_with(plain, chosen):
        if restart:
            own = "wte" if _is_tied_head(plain, target) else target.name
            lora_factors(module, name).reset(f"{name}.{own}", seed)
    if not restart:
        for name in chosen:
            remove_adapters(plain, name)
    return chosen


def remove_adapters(model: nn.Module, name: str) -> None:
    """Remove a set of adapters without merging it.

    Raises:
        UsageError: The model has no such set.
    """
    plain = unwrap_model(model)
    _require(plain, name)
    left = [other for other in active_adapters(plain) if other != name]
    for target in lora_targets(plain):
        _drop(target, name)
    plain.config.lora = {other: table for other, table in plain.config.lora.items() if other != name}
    _clear_rank_settings(plain, name)
    set_adapters(plain, left)


def set_adapters(model: nn.Module, names: Sequence[str]) -> None:
    """Make these sets of adapters the active ones, and no others.

    Raises:
        UsageError: The model has no such set.
    """
    plain, names = unwrap_model(model), list(dict.fromkeys(names))
    _activate(plain, names)
    # Without any set the default applies: sets that are added later become active.
    plain.config.active_adapters = names if plain.config.lora else None


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the sets that are active now."""
    return unwrap_model(model).config.active_adapter_names


def add_adapters(model: nn.Module, name: str, table: LoraConfig) -> None:
    """Add another set of adapters, which changes nothing until it is trained, and activate it as well.

    Args:
        model: A transformer, wrapped or not.
        name: The new set's name.
        table: Its ranks by target, strength and dropout.

    Raises:
        UsageError: The name is taken, or a target or rank is invalid.
    """
    plain = unwrap_model(model)
    if name in plain.config.lora:
        raise UsageError(f"the model already has an adapter {name!r}; give the new one another name")
    check_adapter(plain, name, table)
    table = table.with_tied_head() if plain.config.tie_word_embeddings else table
    for target in lora_targets(plain):
        _resize(plain, target, name, table)
    _record(plain, name, table)
    set_adapters(plain, [*active_adapters(plain), name])


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return any(piece in ("lora", "adapter", "domain_adapter") for piece in name.split("."))


def adapter_name_of(name: str) -> str | None:
    """The set whose low-rank adapter a parameter of this name belongs to, or None."""
    _, separator, rest = name.partition(".lora.")
    return rest.partition(".")[0] if separator else None


def train_adapters_only(model: nn.Module) -> None:
    """Freeze every parameter that is not an adapter's."""
    for name, parameter in unwrap_model(model).named_parameters():
        if not is_adapter_parameter(name):
            parameter.requires_grad_(False)


def freeze_inactive_adapters(model: nn.Module) -> None:
    """Freeze the sets that are not active: no gradient reaches them, and ranks would wait for one."""
    plain = unwrap_model(model)
    inactive = set(plain.config.lora) - set(active_adapters(plain))
    for name, parameter in plain.named_parameters():
        if adapter_name_of(name) in inactive:
            parameter.requires_grad_(False)


def _activate(model: TransformerBase, names: Sequence[str]) -> None:
    """Let the modules add these sets. Raises UsageError for one that the model does not have."""
    for name in names:
        _require(model, name)
    for target in lora_targets(model):
        module = target.module
        if isinstance(module, (LoraLinear, LoraEmbedding)):
            module.active = [name for name in names if name in module.lora]


def _resize(model: TransformerBase, target: LoraTarget, name: str, table: LoraConfig, seed: int = 0) -> None:
    """Give one matrix's adapter in a set the rank that `table` has for it, keeping what it computes as far as
    the rank allows.
    """
    own_name = "wte" if _is_tied_head(model, target) else target.name
    rank = table.rank_of(own_name)
    module = target.module
    old = None
    if isinstance(module, (LoraLinear, LoraEmbedding)) and name in module.lora:
        old = lora_factors(module, name)
    if old is None and rank == 0:
        return
    if old is not None and rank == 0:
        if not _is_tied_head(model, target):
            _merge(target.with_adapters(), name)
        _drop(target, name)
        return
    adapted = target.with_adapters()
    if _is_tied_head(model, target):
        assert isinstance(model.wte, LoraEmbedding), "the embedding comes before the head that is tied to it"
        adapted.lora[name] = model.wte.lora[name]
    else:
        dropout = 0.0 if own_name in EMBEDDINGS else table.dropout
        new = LoraFactors(adapted.weight.detach(), rank, table.scale_of(own_name), dropout)
        adapted.lora[name] = _initialized(new, old, f"{name}.{own_name}", seed)
    adapted.lora.train(adapted.training)


@torch.no_grad()
def _initialized(new: LoraFactors, old: LoraFactors | None, name: str, seed: int) -> LoraFactors:
    """`new`, drawn, with what `old` computes as far as its rank allows."""
    if old is None:
        new.reset(name, seed)
        return new
    a, b = _truncated(old, min(new.rank, old.rank))
    new.a[: a.size(0)] = a
    new.b[:, : a.size(0)] = b * (old.scale / new.scale)
    new.reset(name, seed, a.size(0))
    new.a.requires_grad_(old.a.requires_grad)
    new.b.requires_grad_(old.b.requires_grad)
    return new


def _truncated(factors: LoraFactors, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the best approximation of this rank to the product (Eckart–Young), without its scale."""
    if rank == factors.rank:
        return factors.a, factors.b
    basis_b, inner_b = torch.linalg.qr(factors.b.double())
    basis_a, inner_a = torch.linalg.qr(factors.a.double().T)
    left, values, right = torch.linalg.svd(inner_b @ inner_a.T)
    roots = values[:rank].sqrt()
    a = roots[:, None] * (right[:rank] @ basis_a.T)
    b = (basis_b @ left[:, :rank]) * roots
    return a.to(factors.a), b.to(factors.b)


@torch.no_grad()
def _merge(module: LoraModule, name: str) -> None:
    factors = lora_factors(module, name)
    module.weight += ((factors.b.double() @ factors.a.double()) * factors.scale).to(module.weight.dtype)


def _drop(target: LoraTarget, name: str) -> None:
    module = target.module
    if isinstance(module, (LoraLinear, LoraEmbedding)) and name in module.lora:
        del module.lora[name]
        module.active = [other for other in module.active if other != name]
        if not module.lora:
            target.remove_wrapper()


def _modules_with(
    model: TransformerBase, names: Sequence[str]
) -> Iterator[tuple[LoraTarget, LoraModule, str]]:
    for target in lora_targets(model):
        module = target.module
        if isinstance(module, (LoraLinear, LoraEmbedding)):
            yield from ((target, module, name) for name in names if name in module.lora)


def _is_tied_head(model: TransformerBase, target: LoraTarget) -> bool:
    return target.name == "lm_head" and model.config.tie_word_embeddings


def _is_within(target: str, parts: Sequence[str]) -> bool:
    return any(target == part or target.startswith(f"{part}.") for part in parts)


def _table_or_new(model: TransformerBase, name: str) -> LoraConfig:
    config = model.config
    new = LoraConfig(alpha=config.lora_alpha, dropout=config.lora_dropout, use_rslora=config.use_rslora)
    return config.lora.get(name, new)


def _record(model: TransformerBase, name: str, table: LoraConfig) -> None:
    kept = {**model.config.lora, name: table}
    model.config.lora = {each: one for each, one in kept.items() if any(one.ranks.values())}
    if name not in model.config.lora:
        _clear_rank_settings(model, name)


def _clear_rank_settings(model: TransformerBase, name: str) -> None:
    """Once the set `default` is gone, the single rank settings must not create it again."""
    if name == DEFAULT_ADAPTER:
        for field in ("attn_lora_rank", "mlp_lora_rank", "embedding_lora_rank", "head_lora_rank"):
            setattr(model.config, field, 0)


def _require(model: TransformerBase, name: str) -> None:
    if name not in model.config.lora:
        known = ", ".join(model.config.lora) or "none"
        raise UsageError(f"the model has no adapter {name!r}; its adapters are: {known}")
