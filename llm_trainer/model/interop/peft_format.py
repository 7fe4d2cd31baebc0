"""Adapters in PEFT's folder form: adapter_config.json and adapter_model.safetensors, written and read without
peft.

`peft` opens what is written here over the `transformers` model of the same base, and what it saved is read here, with equal logits.
GPT-2's files hold query, key and value in one matrix: three adapters of ours become one with their factors side by side and B block by
block, of the sum of their ranks, and are taken apart again when read; a foreign adapter of that matrix becomes three that share A.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llm_trainer.config.schema.lora import DEFAULT_NAME, LoraConfig
from llm_trainer.errors import CheckpointError, UsageError
from llm_trainer.model.adapters.lora import add_adapters, targets
from llm_trainer.model.adapters.lora_layers import LoraEmbedding, LoraLinear, LowRank
from llm_trainer.model.hf.config import family_of
from llm_trainer.model.hf.weight_map import entries
from llm_trainer.model.module_names import plain_name, unwrapped
from llm_trainer.model.transformer import Transformer

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Words of their file that change what is computed, with the values that are computed here.
_FIXED: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",), "bias": ("none", None), "use_dora": (False, None), "use_qalora": (False, None), "lora_bias": (False, None),
    "modules_to_save": (None, []), "trainable_token_indices": (None, []), "layer_replication": (None, []), "use_bdlora": (False, None),
    "alora_invocation_tokens": (None, []), "target_parameters": (None, []), "arrow_config": (None,), "megatron_config": (None,),
    "kasa_config": (None,), "monteclora_config": (None,),
}  # fmt: skip
# How peft can begin adapters without taking their product from the weights under them. PiSSA, OLoRA, CorDA,
# LoftQ and LoRA-GA do that, and peft does it again to the base that an adapter is put on; the folder holds
# only what lies over that other base.
_KEEPING_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class Factors:
    """An adapter of one matrix of theirs: A (rank, in), B (out, rank), what their product is multiplied by."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.size(0)


def save_adapter(
    model: nn.Module, folder: Path | str, name: str = DEFAULT_NAME, *, base: str | None = None
) -> None:
    """Write one set of adapters into `folder`; `base` is what peft shall take for its model.

    Raises UsageError for a set that the model does not have and for a shape that no class of transformers
    computes.
    """
    plain, place = unwrapped(model), Path(folder)
    if name not in plain.config.lora:
        raise UsageError(
            f"the model has no adapter {name!r}; those that it has: {', '.join(plain.config.lora) or 'none'}"
        )
    if family_of(plain.config) is None:
        raise UsageError(
            "transformers has no class for this shape, so that peft has nothing to put the adapter on; merge it instead"
        )
    held = _low_ranks(plain, name)
    factors = {
        theirs: joined
        for theirs, ours in _modules(plain).items()
        if (joined := _joined(plain, held, ours)) is not None
    }
    place.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for theirs, one in factors.items():
        if theirs.endswith(("wte", "embed_tokens")):
            tensors |= {
                f"{_PREFIX}{theirs}.lora_embedding_A": one.b.T,
                f"{_PREFIX}{theirs}.lora_embedding_B": one.a.T,
            }
        else:
            tensors |= {f"{_PREFIX}{theirs}.lora_A.weight": one.a, f"{_PREFIX}{theirs}.lora_B.weight": one.b}
    save_file(
        {key: value.detach().cpu().contiguous() for key, value in tensors.items()},
        place / WEIGHTS_NAME,
        metadata={"format": "pt"},
    )
    content = _config_content(
        plain.config.lora[name], factors, base, is_gpt2=family_of(plain.config) == "gpt2"
    )
    (place / CONFIG_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_adapter(model: nn.Module, folder: Path | str, name: str = DEFAULT_NAME) -> None:
    """Add the adapters in a folder to the model as a set of this name, in use. Raises CheckpointError for one
    that does not fit it.
    """
    plain, place = unwrapped(model), Path(folder)
    config = _read_config(place)
    factors = _read_factors(place, config)
    modules = _modules(plain)
    strange = sorted(factors.keys() - modules.keys())
    if strange:
        raise CheckpointError(
            f"{place} adapts {strange[0]}, which this model does not have; it belongs to another base"
        )
    ours: dict[str, Factors] = {}
    for theirs, one in factors.items():
        ours |= _split(plain, modules[theirs], one, theirs)
    if plain.config.tie_word_embeddings and not _alike(ours.get("wte"), ours.pop("lm_head", None)):
        raise CheckpointError(
            f"{place} adapts only one of embedding and head, or each in another way, and this model shares one matrix between them"
        )
    use_rslora = bool(config.get("use_rslora"))
    strength = {
        target: one.scale * (math.sqrt(one.rank) if use_rslora else one.rank) for target, one in ours.items()
    }
    ranks = {target: one.rank for target, one in ours.items()}
    dropout = float(config.get("lora_dropout") or 0.0)
    add_adapters(
        plain, name, LoraConfig(ranks=ranks, alphas=strength, dropout=dropout, use_rslora=use_rslora)
    )
    with torch.no_grad():
        for target, low in _low_ranks(plain, name).items():
            one = ours["wte" if target == "lm_head" and plain.config.tie_word_embeddings else target]
            low.a.copy_(one.a)
            low.b.copy_(one.b)


def is_adapter_folder(folder: Path | str) -> bool:
    """Whether PEFT's configuration lies there."""
    return (Path(folder) / CONFIG_NAME).is_file()


def _modules(model: Transformer) -> dict[str, list[str]]:
    """Module of theirs → the targets of ours that it is."""
    names = [
        plain_name(name)
        for name, _ in model.named_parameters()
        if name.endswith(".weight") and ".lora." not in name
    ]
    places = {_weight_of(target.name): target.name for target in targets(model)}
    found = {
        entry.theirs.removesuffix(".weight"): [places[name] for name in entry.ours]
        for entry in entries(names, family_of(model.config) or "llm_trainer")
        if all(name in places for name in entry.ours)
    }
    return {**found, "lm_head": ["lm_head"]}


def _weight_of(target: str) -> str:
    kind, _, rest = target.partition(".")
    number, _, projection = rest.partition(".")
    return f"blocks.{number}.{kind}.{projection}.weight" if rest else f"{kind}.weight"


def _low_ranks(model: Transformer, name: str) -> dict[str, LowRank]:
    found: dict[str, LowRank] = {}
    for target in targets(model):
        module = target.module
        if isinstance(module, (LoraLinear, LoraEmbedding)) and name in module.lora:
            low = module.lora[name]
            assert isinstance(low, LowRank)
            found[target.name] = low
    return found


def _joined(model: Transformer, held: Mapping[str, LowRank], ours: list[str]) -> Factors | None:
    """One adapter for matrices of ours that are one of theirs; one scale for all, into which B is brought."""
    there = [held[target] for target in ours if target in held]
    if not there:
        return None
    if len(ours) == 1:
        return Factors(there[0].a.detach(), there[0].b.detach(), there[0].scale)
    sizes = {target.name: target.module.weight.size(0) for target in targets(model)}
    scale = there[0].scale
    blocks = [
        held[one].b.detach() * (held[one].scale / scale)
        if one in held
        else there[0].b.new_zeros(sizes[one], 0)
        for one in ours
    ]
    return Factors(torch.cat([low.a.detach() for low in there]), _block_diagonal(blocks), scale)


def _split(model: Transformer, ours: list[str], one: Factors, theirs: str) -> dict[str, Factors]:
    """Theirs as ours; the reverse of `_joined` where B is in blocks. Raises CheckpointError for other shapes
    than the matrix has.
    """
    shapes = {target.name: tuple(target.module.weight.shape) for target in targets(model)}
    outputs, inputs = sum(shapes[target][0] for target in ours), shapes[ours[0]][1]
    if one.a.size(1) != inputs or one.b.size(0) != outputs or one.a.size(0) != one.b.size(1):
        raise CheckpointError(
            f"the adapter of {theirs} has factors of {tuple(one.a.shape)} and {tuple(one.b.shape)}, the matrix is {outputs} × {inputs}"
        )
    rows = one.b.tensor_split(len(ours))
    share = one.rank // len(ours)
    blocks = [row[:, number * share : (number + 1) * share] for number, row in enumerate(rows)]
    if len(ours) > 1 and share * len(ours) == one.rank and torch.equal(_block_diagonal(blocks), one.b):
        return {
            target: Factors(a, b, one.scale)
            for target, a, b in zip(ours, torch.split(one.a, share), blocks, strict=True)
        }
    return {target: Factors(one.a, row, one.scale) for target, row in zip(ours, rows, strict=True)}


def _block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    joined: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return joined


def _alike(embedding: Factors | None, head: Factors | None) -> bool:
    if embedding is None or head is None:
        return embedding is head
    same = (
        embedding.a.shape == head.a.shape
        and torch.equal(embedding.a, head.a)
        and torch.equal(embedding.b, head.b)
    )
    return same and math.isclose(embedding.scale, head.scale)


def _config_content(
    table: LoraConfig, factors: Mapping[str, Factors], base: str | None, *, is_gpt2: bool
) -> dict[str, Any]:
    ranks = {theirs: one.rank for theirs, one in factors.items()}
    alphas = {
        theirs: one.scale * (math.sqrt(one.rank) if table.use_rslora else one.rank)
        for theirs, one in factors.items()
    }
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": table.dropout,
        "use_rslora": table.use_rslora,
        "fan_in_fan_out": is_gpt2,
        "bias": "none",
        "target_modules": list(factors),
        "rank_pattern": {_pattern(theirs): one for theirs, one in ranks.items() if one != rank},
        "alpha_pattern": {_pattern(theirs): one for theirs, one in alphas.items() if one != alpha},
    }


def _pattern(module: str) -> str:
    return f"^{re.escape(module)}"


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; an adapter's folder holds {CONFIG_NAME} and {WEIGHTS_NAME}"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    for word, computed in _FIXED.items():
        if word in config and config[word] not in computed:
            raise CheckpointError(
                f"{path} has {word} = {config[word]!r}; only {computed[0]!r} is computed here"
            )
    beginning = config.get("init_lora_weights")
    if (beginning.lower() if isinstance(beginning, str) else beginning) not in _KEEPING_BASE:
        raise CheckpointError(
            f"{path} has init_lora_weights = {beginning!r}, which changes the weights under the adapter, and they are not in the folder; "
            "take the model that peft merges it into (merge_and_unload), or save it with path_initial_model_for_weight_conversion"
        )
    return config


def _read_factors(folder: Path, config: Mapping[str, Any]) -> dict[str, Factors]:
    try:
        tensors = load_file(folder / WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS_NAME} cannot be read: {error}") from error
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_(embedding_)?([AB])(\.weight)?", key)
        if match is None:
            raise CheckpointError(
                f"{folder / WEIGHTS_NAME} holds {key}, which is no factor of a low-rank adapter"
            )
        turned = tensor.T if match[2] else tensor
        kind = (
            match[3] if not match[2] else {"A": "B", "B": "A"}[match[3]]
        )  # an embedding's A is what ours has as B, turned over
        pairs.setdefault(match[1], {})[kind] = turned
    halves = [theirs for theirs, pair in pairs.items() if len(pair) < 2]
    if halves or not pairs:
        raise CheckpointError(
            f"{folder / WEIGHTS_NAME} lacks a factor of {halves[0] if halves else 'every adapter'}"
        )
    return {
        theirs: Factors(pair["A"], pair["B"], _scale(theirs, pair["A"].size(0), config))
        for theirs, pair in pairs.items()
    }


def _scale(module: str, rank: int, config: Mapping[str, Any]) -> float:
    patterns = config.get("alpha_pattern") or {}
    special = [alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)]
    alpha = float(special[0] if special else config.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
