"""Adapters in PEFT's folder format, adapter_config.json and adapter_model.safetensors, without the peft
package.

`peft` opens what is written here over the `transformers` model of the same base, and what it saved is read
here, with equal logits. GPT-2's files have query, key and value in one matrix. Three of our adapters become
one adapter of that matrix, whose rank is the sum of theirs: their factors A are stacked, and their factors B
are the blocks of a block-diagonal B. It is split again when it is read. A foreign adapter of the matrix
becomes three with the same A.
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

from llm_trainer.config.schema.lora import DEFAULT_ADAPTER, LoraConfig
from llm_trainer.errors import CheckpointError, UsageError
from llm_trainer.model.adapters.lora import add_adapters, lora_targets
from llm_trainer.model.adapters.lora_layers import LoraEmbedding, LoraFactors, LoraLinear, lora_factors
from llm_trainer.model.base import TransformerBase
from llm_trainer.model.hf.config import hf_family
from llm_trainer.model.hf.weight_map import tensor_mappings
from llm_trainer.model.module_names import canonical_name, unwrap_model

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Keys of PEFT's configuration that change what is computed, with the values that are supported here.
_FIXED: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",), "bias": ("none", None), "use_dora": (False, None), "use_qalora": (False, None),
    "lora_bias": (False, None), "modules_to_save": (None, []), "trainable_token_indices": (None, []),
    "layer_replication": (None, []), "use_bdlora": (False, None), "alora_invocation_tokens": (None, []),
    "target_parameters": (None, []), "arrow_config": (None,), "megatron_config": (None,),
    "kasa_config": (None,), "monteclora_config": (None,),
}  # fmt: skip
# Initializations of PEFT that leave the base weights as they are. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA
# subtract the adapter's product from the base, and peft does it again to the base that an adapter is loaded
# over; the folder has only what is added to that changed base.
_BASE_KEEPING_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class _HfFactors:
    """An adapter of one matrix of a Hugging Face model: A (rank, in), B (out, rank) and their product's
    factor.
    """

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.size(0)


def save_adapter(
    model: nn.Module, folder: Path | str, name: str = DEFAULT_ADAPTER, *, base: str | None = None
) -> None:
    """Write one set of adapters into a folder of PEFT's format.

    Args:
        model: A transformer, wrapped or not.
        folder: Where to write; it is created if it does not exist.
        name: The set.
        base: The base model that peft should load, as a path or a name on the hub.

    Raises:
        UsageError: The model has no such set, or transformers has no class for its shape.
    """
    plain, target = unwrap_model(model), Path(folder)
    if name not in plain.config.lora:
        raise UsageError(
            f"the model has no adapter {name!r}; its adapters are: {', '.join(plain.config.lora) or 'none'}"
        )
    family = hf_family(plain.config)
    if family is None:
        raise UsageError(
            "transformers has no class for this shape, so that peft has no model to load the adapter over; "
            "merge the adapter into the model instead"
        )
    own = _adapter_factors(plain, name)
    factors = {
        module: combined
        for module, targets in _hf_modules(plain).items()
        if (combined := _combined(plain, own, targets)) is not None
    }
    target.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for module, one in factors.items():
        key = f"{_PREFIX}{module}"
        if module.endswith(("wte", "embed_tokens")):
            tensors |= {f"{key}.lora_embedding_A": one.b.T, f"{key}.lora_embedding_B": one.a.T}
        else:
            tensors |= {f"{key}.lora_A.weight": one.a, f"{key}.lora_B.weight": one.b}
    save_file(
        {key: value.detach().cpu().contiguous() for key, value in tensors.items()},
        target / WEIGHTS_NAME,
        metadata={"format": "pt"},
    )
    content = _config_content(plain.config.lora[name], factors, base, is_gpt2=family == "gpt2")
    (target / CONFIG_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_adapter(model: nn.Module, folder: Path | str, name: str = DEFAULT_ADAPTER) -> None:
    """Add the adapters in a folder to the model, as an active set.

    Args:
        model: A transformer, wrapped or not.
        folder: A folder of PEFT's format.
        name: The new set's name.

    Raises:
        CheckpointError: The folder cannot be read, uses something that is not supported, or does not fit the
            model.
        UsageError: The name is taken.
    """
    plain, source = unwrap_model(model), Path(folder)
    config = _read_config(source)
    modules = _hf_modules(plain)
    factors = _read_factors(source, config, _base_embeddings(plain, modules))
    unknown = sorted(factors.keys() - modules.keys())
    if unknown:
        raise CheckpointError(
            f"{source} has an adapter of {unknown[0]}, which this model does not have; it belongs to another "
            "base"
        )
    by_target: dict[str, _HfFactors] = {}
    for module, one in factors.items():
        by_target |= _split(plain, modules[module], one, module)
    if plain.config.tie_word_embeddings and not _equal(by_target.get("wte"), by_target.pop("lm_head", None)):
        raise CheckpointError(
            f"{source} adapts only one of embedding and head, or both differently, but this model shares one "
            "matrix between them"
        )
    use_rslora = bool(config.get("use_rslora"))
    alphas = {
        target: one.scale * (math.sqrt(one.rank) if use_rslora else one.rank)
        for target, one in by_target.items()
    }
    ranks = {target: one.rank for target, one in by_target.items()}
    dropout = float(config.get("lora_dropout") or 0.0)
    add_adapters(plain, name, LoraConfig(ranks=ranks, alphas=alphas, dropout=dropout, use_rslora=use_rslora))
    with torch.no_grad():
        for target, own in _adapter_factors(plain, name).items():
            is_tied_head = target == "lm_head" and plain.config.tie_word_embeddings
            one = by_target["wte" if is_tied_head else target]
            own.a.copy_(one.a)
            own.b.copy_(one.b)


def is_adapter_folder(folder: Path | str) -> bool:
    """Whether a folder has PEFT's configuration in it."""
    return (Path(folder) / CONFIG_NAME).is_file()


def _hf_modules(model: TransformerBase) -> dict[str, list[str]]:
    """Module of the Hugging Face model → the LoRA targets that it is made of."""
    names = [
        canonical_name(name)
        for name, _ in model.named_parameters()
        if name.endswith(".weight") and ".lora." not in name
    ]
    target_of = {_weight_of(target.name): target.name for target in lora_targets(model)}
    found = {
        mapping.hf_name.removesuffix(".weight"): [target_of[name] for name in mapping.names]
        for mapping in tensor_mappings(names, hf_family(model.config) or "llm_trainer")
        if all(name in target_of for name in mapping.names)
    }
    return {**found, "lm_head": ["lm_head"]}


def _weight_of(target: str) -> str:
    kind, _, rest = target.partition(".")
    number, _, projection = rest.partition(".")
    return f"blocks.{number}.{kind}.{projection}.weight" if rest else f"{kind}.weight"


def _adapter_factors(model: TransformerBase, name: str) -> dict[str, LoraFactors]:
    found: dict[str, LoraFactors] = {}
    for target in lora_targets(model):
        module = target.module
        if isinstance(module, (LoraLinear, LoraEmbedding)) and name in module.lora:
            found[target.name] = lora_factors(module, name)
    return found


def _combined(
    model: TransformerBase, own: Mapping[str, LoraFactors], targets: list[str]
) -> _HfFactors | None:
    """One adapter for the targets that are one Hugging Face matrix, with one scale, which B absorbs."""
    present = [own[target] for target in targets if target in own]
    if not present:
        return None
    if len(targets) == 1:
        return _HfFactors(present[0].a.detach(), present[0].b.detach(), present[0].scale)
    sizes = {target.name: target.module.weight.size(0) for target in lora_targets(model)}
    scale = present[0].scale
    blocks = [
        own[target].b.detach() * (own[target].scale / scale)
        if target in own
        else present[0].b.new_zeros(sizes[target], 0)
        for target in targets
    ]
    return _HfFactors(torch.cat([one.a.detach() for one in present]), _block_diagonal(blocks), scale)


def _split(model: TransformerBase, targets: list[str], one: _HfFactors, module: str) -> dict[str, _HfFactors]:
    """The adapter of each target; the inverse of `_combined` where B is block-diagonal.

    Raises CheckpointError where the factors do not have the shape of the matrix.
    """
    shapes = {target.name: tuple(target.module.weight.shape) for target in lora_targets(model)}
    outputs, inputs = sum(shapes[target][0] for target in targets), shapes[targets[0]][1]
    if one.a.size(1) != inputs or one.b.size(0) != outputs or one.a.size(0) != one.b.size(1):
        raise CheckpointError(
            f"the adapter of {module} has factors of {tuple(one.a.shape)} and {tuple(one.b.shape)}, but the "
            f"matrix is {outputs} × {inputs}"
        )
    rows = one.b.tensor_split(len(targets))
    rank = one.rank // len(targets)
    blocks = [row[:, number * rank : (number + 1) * rank] for number, row in enumerate(rows)]
    if len(targets) > 1 and rank * len(targets) == one.rank and torch.equal(_block_diagonal(blocks), one.b):
        return {
            target: _HfFactors(a, b, one.scale)
            for target, a, b in zip(targets, torch.split(one.a, rank), blocks, strict=True)
        }
    return {target: _HfFactors(one.a, row, one.scale) for target, row in zip(targets, rows, strict=True)}


def _block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    matrix: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return matrix


def _equal(embedding: _HfFactors | None, head: _HfFactors | None) -> bool:
    if embedding is None or head is None:
        return embedding is head
    same = (
        embedding.a.shape == head.a.shape
        and torch.equal(embedding.a, head.a)
        and torch.equal(embedding.b, head.b)
    )
    return same and math.isclose(embedding.scale, head.scale)


def _config_content(
    table: LoraConfig, factors: Mapping[str, _HfFactors], base: str | None, *, is_gpt2: bool
) -> dict[str, Any]:
    ranks = {module: one.rank for module, one in factors.items()}
    alphas = {
        module: one.scale * (math.sqrt(one.rank) if table.use_rslora else one.rank)
        for module, one in factors.items()
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
        "rank_pattern": {_pattern(module): one for module, one in ranks.items() if one != rank},
        "alpha_pattern": {_pattern(module): one for module, one in alphas.items() if one != alpha},
    }


def _pattern(module: str) -> str:
    return f"^{re.escape(module)}"


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; an adapter's folder has {CONFIG_NAME} and {WEIGHTS_NAME}"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    for key, supported in _FIXED.items():
        if key in config and config[key] not in supported:
            raise CheckpointError(
                f"{key} = {config[key]!r} in {path} is not supported; only {supported[0]!r} is"
            )
    initialization = config.get("init_lora_weights")
    plain = initialization.lower() if isinstance(initialization, str) else initialization
    if plain not in _BASE_KEEPING_INITIALIZATIONS:
        raise CheckpointError(
            f"{path} has init_lora_weights = {initialization!r}, which changes the weights under the "
            "adapter, and the folder does not have them; take the model that peft merges it into "
            "(merge_and_unload), or save it with path_initial_model_for_weight_conversion"
        )
    return config


def _base_embeddings(model: TransformerBase, modules: Mapping[str, list[str]]) -> dict[str, Tensor]:
    """Module of the Hugging Face model → its weight, for embedding and head."""
    weights = {target.name: target.module.weight for target in lora_targets(model)}
    return {
        module: weights[targets[0]].detach()
        for module, targets in modules.items()
        if targets[0] in ("wte", "lm_head") and targets[0] in weights
    }


def _check_base_embedding(path: Path, module: str, stored: Tensor, own: Tensor | None) -> None:
    """Check a base weight that peft saved with an adapter, as it does by default where the embedding is
    adapted.

    Raises CheckpointError where it is not the base's own, to the precision of the less precise of the two.
    """
    instead = (
        "load the adapter over the base that it was trained over, or take the model that peft merges it into "
        "(merge_and_unload)"
    )
    if own is None or own.shape != stored.shape:
        here = "none" if own is None else " × ".join(map(str, own.shape))
        raise CheckpointError(
            f"{path} contains {module} of the base with {' × '.join(map(str, stored.shape))} values, but "
            f"this model has {here}: the base was changed before the adapter was trained; {instead}"
        )
    if own.is_meta:  # only shapes are asked for
        return
    dtype = min(own.dtype, stored.dtype, key=lambda one: one.itemsize)
    if not torch.equal(own.to("cpu", dtype), stored.to(dtype)):
        raise CheckpointError(
            f"{path} contains {module} of the base with other values than this model has: it was trained "
            f"over another base, or trained the embedding too; {instead}"
        )


def _read_factors(
    folder: Path, config: Mapping[str, Any], base_embeddings: Mapping[str, Tensor]
) -> dict[str, _HfFactors]:
    path = folder / WEIGHTS_NAME
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_(embedding_)?([AB])(\.weight)?", key)
        base = re.fullmatch(
            rf"{re.escape(_PREFIX)}((?:.+\.)?(?:wte|embed_tokens|lm_head))(\.base_layer)?\.weight", key
        )
        if base is not None:
            _check_base_embedding(path, base[1], tensor, base_embeddings.get(base[1]))
            continue
        if match is None:
            raise CheckpointError(f"{path} has {key}, which is not a factor of a low-rank adapter")
        if match[2]:  # PEFT's A of an embedding is our B, transposed, and the other way round
            pairs.setdefault(match[1], {})["B" if match[3] == "A" else "A"] = tensor.T
        else:
            pairs.setdefault(match[1], {})[match[3]] = tensor
    incomplete = [module for module, pair in pairs.items() if len(pair) < 2]
    if incomplete or not pairs:
        raise CheckpointError(f"{path} lacks a factor of {incomplete[0] if incomplete else 'every adapter'}")
    return {
        module: _HfFactors(pair["A"], pair["B"], _scale(module, pair["A"].size(0), config))
        for module, pair in pairs.items()
    }


def _scale(module: str, rank: int, config: Mapping[str, Any]) -> float:
    patterns = config.get("alpha_pattern") or {}
    special = [alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)]
    alpha = float(special[0] if special else config.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
