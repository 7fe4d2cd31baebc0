"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on attention, MLP, embedding and head, in named sets.

A matrix W (out, in) with adapters computes x·Wᵀ + scale · (x·Aᵀ)·Bᵀ for each set that is in use, A (rank, in)
and B (out, rank). The matrix stays the module's own `weight` under its own name, so files, optimizers and
joined products (`transformer.project`) see the same model with something beside it. Embedding and head have
the same two factors over (V, C); where they share their matrix they share its adapters too, so that merging
keeps both functions.

`model.config.lora` says which adapters there are, `lora_in_use` which of them count, and every function here keeps both true: the shape
of a checkpoint is its config.json, and whoever builds the model again builds the same function.
New factors A are drawn from a seed that is the adapter's name and a number, so that all ranks draw the same ones; new columns of B are
zero, so that the function does not change. Adapters that begin again after a merge should have another number: they are to read other
directions than before (ReLoRA: Lialin et al. 2023, arXiv:2307.05695).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm_trainer.config.schema.lora import DEFAULT_NAME, LoraConfig
from llm_trainer.errors import UsageError
from llm_trainer.model.adapters.lora_layers import Adapted, LoraEmbedding, LoraLinear, LowRank, low_rank_of
from llm_trainer.model.module_names import matching_parts, unwrapped
from llm_trainer.model.transformer import Embedding, Linear, Transformer

MATRICES = ("wte", "lm_head")
PROJECTIONS = {"attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


@dataclass(frozen=True)
class Target:
    """A matrix that can have adapters: its name (`attn.2.q_proj`, `wte`), the module that holds its module,
    and under which name.
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

    def adapted(self) -> Adapted:
        """The module, made one that takes adapters."""
        module = self.module
        if isinstance(module, (LoraLinear, LoraEmbedding)):
            return module
        made = LoraEmbedding(module) if isinstance(module, nn.Embedding) else LoraLinear(module)
        setattr(self.owner, self.attribute, made)
        return made

    def make_plain(self) -> None:
        """Put a module without adapters in the place of one that has none left."""
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


def targets(model: nn.Module) -> list[Target]:
    """Every matrix of the model that can have adapters, in order."""
    plain = unwrapped(model)
    found = [Target("wte", plain, "wte")]
    for number, block in enumerate(plain.blocks):
        for kind, names in PROJECTIONS.items():
            part = getattr(block, kind)
            found += [
                Target(f"{kind}.{number}.{name}", part, name)
                for name in names
                if getattr(part, name, None) is not None
            ]
    return [*found, Target("lm_head", plain, "lm_head")]


def attach_all(model: Transformer) -> None:
    """Give a new model the adapters that its configuration names, with those in use that it says. Raises
    UsageError for what cannot be.
    """
    for name, table in model.config.lora.items():
        check_table(model, name, table)
        for target in targets(model):
            _resize(model, target, name, table)
    _count(model, model.config.counting_lora)


def check_table(model: nn.Module, name: str, table: LoraConfig) -> None:
    """Raises UsageError for a set's name or a target that cannot be."""
    if not name or "." in name:
        raise UsageError(f"an adapter cannot be called {name!r}: give a name without a dot")
    known = {target.name for target in targets(model)} | {
        target.name.rpartition(".")[0] for target in targets(model)
    }
    for wanted, rank in table.ranks.items():
        if wanted not in known or not wanted:
            raise UsageError(
                f"LoRA cannot be on {wanted!r}: give attn.N, mlp.N, a projection of them (attn.0.q_proj), wte or lm_head"
            )
        if rank < 0:
            raise UsageError(f"LoRA rank {rank} of {wanted}: a rank is 0 or more")


def set_lora_rank(
    model: nn.Module, parts: str | Sequence[str], rank: int, *, name: str = DEFAULT_NAME, seed: int = 0
) -> list[str]:
    """Give parts (names, ranges, globs of attn.N, mlp.N, wte, lm_head) adapters of this rank; returns the
    parts.

    A larger rank keeps the product to rounding, 0 merges and removes, a smaller one keeps what the singular
    values say matters most. What is new is drawn from `seed`. New adapters are trained; whether their
    matrices are is left as it is.

    Raises UsageError for parts that take no adapters.
    """
    plain = unwrapped(model)
    chosen = matching_parts(plain, parts)
    refused = [part for part in chosen if part not in MATRICES and part.split(".")[0] not in PROJECTIONS]
    if refused:
        raise UsageError(
            f"LoRA cannot be on {', '.join(refused)}: attn.N, mlp.N, wte and lm_head have matrices for it"
        )
    if rank < 0:
        raise UsageError(f"LoRA rank {rank}: a rank is 0 or more")
    if plain.config.tie_word_embeddings and set(chosen) & set(MATRICES):
        chosen = list(dict.fromkeys([*chosen, *MATRICES]))  # one matrix, one adapter
    recorded = [part for part in chosen if part != "lm_head"] if plain.config.tie_word_embeddings else chosen
    in_use = adapters_in_use(plain) + ([name] if name not in plain.config.lora else [])
    table = _table_or_new(plain, name)
    ranks = {key: value for key, value in table.ranks.items() if not _is_within(key, chosen)}
    changed = table.model_copy(update={"ranks": ranks | dict.fromkeys(recorded, rank)})
    for target in targets(plain):
        if _is_within(target.name, chosen):
            _resize(plain, target, name, changed, seed)
    _record(plain, name, changed)
    use_adapters(plain, [each for each in in_use if each in plain.config.lora])
    return chosen


def merge_lora(
    model: nn.Module, names: Sequence[str] | None = None, *, restart: bool = True, seed: int = 0
) -> list[str]:
    """Fold adapters (none: those in use) into the matrices; `restart`: let them begin again, drawn from
    `seed`, else remove them.

    Returns which they were.
    """
    plain = unwrapped(model)
    chosen = adapters_in_use(plain) if names is None else list(names)
    for name in chosen:
        _require(plain, name)
    for target, module, name in _each(plain, chosen):
        if not _is_second_of_tied(plain, target):
            _fold(module, name)
    for target, module, name in _each(plain, chosen):
        if restart:
            low_rank_of(module, name).restart(
                f"{name}.{'wte' if _is_second_of_tied(plain, target) else target.name}", seed
            )
    if not restart:
        for name in chosen:
            remove_adapters(plain, name)
    return chosen


def remove_adapters(model: nn.Module, name: str) -> None:
    """Take a set away without merging it."""
    plain = unwrapped(model)
    _require(plain, name)
    left = [other for other in adapters_in_use(plain) if other != name]
    for target in targets(plain):
        _drop(target, name)
    plain.config.lora = {other: table for other, table in plain.config.lora.items() if other != name}
    _forget_single_ranks(plain, name)
    use_adapters(plain, left)


def use_adapters(model: nn.Module, names: Sequence[str]) -> None:
    """Let these sets, and no others, count. Raises UsageError for one that the model does not have."""
    plain, names = unwrapped(model), list(dict.fromkeys(names))
    _count(plain, names)
    plain.config.lora_in_use = (
        names if plain.config.lora else None
    )  # sets that come to a model without any count again


def adapters_in_use(model: nn.Module) -> list[str]:
    """Names of the sets that count now."""
    return unwrapped(model).config.counting_lora


def add_adapters(model: nn.Module, name: str, table: LoraConfig) -> None:
    """Give the model another set, at zero and in use beside what is in use. Raises UsageError where the name
    is taken.
    """
    plain = unwrapped(model)
    if name in plain.config.lora:
        raise UsageError(f"the model has an adapter {name!r} already; give the new one another name")
    check_table(plain, name, table)
    table = table.with_tied_head() if plain.config.tie_word_embeddings else table
    for target in targets(plain):
        _resize(plain, target, name, table)
    _record(plain, name, table)
    use_adapters(plain, [*adapters_in_use(plain), name])


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return any(piece in ("lora", "adapter", "domain_adapter") for piece in name.split("."))


def lora_set_of(name: str) -> str | None:
    """The set whose low-rank adapter a parameter of this name belongs to; None: none's."""
    _, low_rank, rest = name.partition(".lora.")
    return rest.partition(".")[0] if low_rank else None


def train_adapters_only(model: nn.Module) -> None:
    """Freeze every parameter that is not an adapter's."""
    for name, parameter in unwrapped(model).named_parameters():
        if not is_adapter_parameter(name):
            parameter.requires_grad_(False)


def freeze_resting_adapters(model: nn.Module) -> None:
    """Freeze the sets that do not count: no gradient reaches them, and ranks would wait for one."""
    plain = unwrapped(model)
    resting = set(plain.config.lora) - set(adapters_in_use(plain))
    for name, parameter in plain.named_parameters():
        if lora_set_of(name) in resting:
            parameter.requires_grad_(False)


def _count(model: Transformer, names: Sequence[str]) -> None:
    """Let the modules add what these sets say. Raises UsageError for one that the model does not have."""
    for name in names:
        _require(model, name)
    for target in targets(model):
        module = target.module
        if isinstance(module, (LoraLinear, LoraEmbedding)):
            module.used = [name for name in names if name in module.lora]


def _resize(model: Transformer, target: Target, name: str, table: LoraConfig, seed: int = 0) -> None:
    """Bring one matrix's adapter of a set to the rank that `table` says, keeping what it computes as far as
    the rank allows.
    """
    named = "wte" if _is_second_of_tied(model, target) else target.name
    rank = table.rank_of(named)
    module = target.module
    held = (
        low_rank_of(module, name)
        if isinstance(module, (LoraLinear, LoraEmbedding)) and name in module.lora
        else None
    )
    if held is None and rank == 0:
        return
    if held is not None and rank == 0:
        if not _is_second_of_tied(model, target):
            _fold(target.adapted(), name)
        _drop(target, name)
        return
    adapted = target.adapted()
    if _is_second_of_tied(model, target):
        assert isinstance(model.wte, LoraEmbedding), (
            "the embedding comes before the head that shares its matrix"
        )
        adapted.lora[name] = model.wte.lora[name]
    else:
        dropout = 0.0 if named in MATRICES else table.dropout
        fresh = LowRank(adapted.weight.detach(), rank, table.scale_of(named), dropout)
        adapted.lora[name] = _resized(held, fresh, f"{name}.{named}", seed)
    adapted.lora.train(adapted.training)


@torch.no_grad()
def _resized(held: LowRank | None, fresh: LowRank, named: str, seed: int) -> LowRank:
    """`fresh`, drawn, with what `held` computes as far as its rank allows."""
    if held is None:
        fresh.restart(named, seed)
        return fresh
    a, b = _factors(held, min(fresh.rank, held.rank))
    fresh.a[: a.size(0)] = a
    fresh.b[:, : a.size(0)] = b * (held.scale / fresh.scale)
    fresh.restart(named, seed, a.size(0))
    fresh.a.requires_grad_(held.a.requires_grad)
    fresh.b.requires_grad_(held.b.requires_grad)
    return fresh


def _factors(held: LowRank, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the best approximation of `held`'s product with this rank (Eckart–Young), without its scale."""
    if rank == held.rank:
        return held.a, held.b
    basis_b, inner_b = torch.linalg.qr(held.b.double())
    basis_a, inner_a = torch.linalg.qr(held.a.double().T)
    left, values, right = torch.linalg.svd(inner_b @ inner_a.T)
    roots = values[:rank].sqrt()
    return (roots[:, None] * (right[:rank] @ basis_a.T)).to(held.a), ((basis_b @ left[:, :rank]) * roots).to(
        held.b
    )


@torch.no_grad()
def _fold(module: Adapted, name: str) -> None:
    low = low_rank_of(module, name)
    module.weight += ((low.b.double() @ low.a.double()) * low.scale).to(module.weight.dtype)


def _drop(target: Target, name: str) -> None:
    module = target.module
    if isinstance(module, (LoraLinear, LoraEmbedding)) and name in module.lora:
        del module.lora[name]
        module.used = [other for other in module.used if other != name]
        if not module.lora:
            target.make_plain()


def _each(model: Transformer, names: Sequence[str]) -> Iterator[tuple[Target, Adapted, str]]:
    for target in targets(model):
        module = target.module
        if isinstance(module, (LoraLinear, LoraEmbedding)):
            yield from ((target, module, name) for name in names if name in module.lora)


def _is_second_of_tied(model: Transformer, target: Target) -> bool:
    return target.name == "lm_head" and model.config.tie_word_embeddings


def _is_within(target: str, parts: Sequence[str]) -> bool:
    return any(target == part or target.startswith(f"{part}.") for part in parts)


def _table_or_new(model: Transformer, name: str) -> LoraConfig:
    config = model.config
    new = LoraConfig(alpha=config.lora_alpha, dropout=config.lora_dropout, use_rslora=config.use_rslora)
    return config.lora.get(name, new)


def _record(model: Transformer, name: str, table: LoraConfig) -> None:
    kept = {**model.config.lora, name: table}
    model.config.lora = {each: one for each, one in kept.items() if any(one.ranks.values())}
    if name not in model.config.lora:
        _forget_single_ranks(model, name)


def _forget_single_ranks(model: Transformer, name: str) -> None:
    """Where `default` is gone the single ranks must not make it anew."""
    if name == DEFAULT_NAME:
        for field in ("attn_lora_rank", "mlp_lora_rank", "embedding_lora_rank", "head_lora_rank"):
            setattr(model.config, field, 0)


def _require(model: Transformer, name: str) -> None:
    if name not in model.config.lora:
        known = ", ".join(model.config.lora) or "none"
        raise UsageError(f"the model has no adapter {name!r}; those that it has: {known}")
