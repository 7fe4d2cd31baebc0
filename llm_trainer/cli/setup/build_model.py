"""Which model a run trains: a new one in the shape that is set, or pretrained weights.

Vocabulary and context come from the data where they are not set: an embedding smaller than the tokenizer is
an error here, before the first step, instead of an index error in the middle of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llm_trainer.config import DataError, ModelConfig, TrainingConfig, UsageError
from llm_trainer.config.presets import is_suggested
from llm_trainer.config.schema.lora import DEFAULT_ADAPTER, LoraConfig

if TYPE_CHECKING:
    from llm_trainer.data.prepared_splits import PreparedDataset
    from llm_trainer.data.tokenization.tokenizer import Tokenizer
    from llm_trainer.model.hf.generation_config import GenerationDefaults
    from llm_trainer.model.transformer import Transformer

# Settings that may differ from those of pretrained weights; everything else is the weights' own shape.
CHANGEABLE = (
    "dropout",
    "attention_dropout",
    "embedding_dropout",
    "gradient_checkpointing",
    "activation_checkpoint_every",
    "activation_checkpoint_policy",
)

FAR_LARGER = 1.5  # rows per id; padding to a multiple of 64 or 128 stays below
TRAINING_BYTES = 16  # per parameter: weight, gradient and AdamW's two moments

# Low-rank adapters: the settings of the default adapter, and with them those of all.
SINGLE_LORA = (
    "attn_lora_rank",
    "mlp_lora_rank",
    "embedding_lora_rank",
    "head_lora_rank",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "lora_train_base",
)
LORA = (*SINGLE_LORA, "lora", "active_adapters")
BOTTLENECKS = ("use_adapter_modules", "use_domain_adaptation", "adapter_size", "adapter_domains")


def resolve_model_config(
    model: ModelConfig, prepared: PreparedDataset, origins: Mapping[str, str]
) -> ModelConfig:
    """The shape of a new model for this data.

    Args:
        model: The settings. They are not changed.
        prepared: The data.
        origins: Dotted name → where a value came from.

    Raises:
        UsageError: If the vocabulary that is set is smaller than the data's.
    """
    updates: dict[str, object] = {"adapter_domains": _domains(model, corpus_names(prepared))}
    rows, needed = model.vocab_size, prepared.vocab_size
    if not _is_chosen(model, "vocab_size", origins):
        updates["vocab_size"] = needed
    elif rows < needed:
        raise UsageError(
            f"model.vocab_size ({origins.get('model.vocab_size', 'default')}) is {rows}, but the tokenizer "
            f"has {needed} ids; set vocab_size to {needed} or leave it out, or prepare the data with a "
            "smaller vocabulary"
        )
    max_length = prepared.metadata.max_length
    if max_length is not None and not _is_chosen(model, "max_position_embeddings", origins):
        updates["max_position_embeddings"] = max_length
    return model.model_copy(update=updates)


def unused_vocabulary(shape: ModelConfig, ids: int) -> str | None:
    """What an embedding far larger than the tokenizer costs, as a line to print; None for others.

    Args:
        shape: The shape of a new model.
        ids: Number of the tokenizer's ids.
    """
    rows = shape.vocab_size - ids
    if shape.vocab_size < FAR_LARGER * ids:
        return None
    parameters = rows * shape.hidden_size * (1 if shape.tie_word_embeddings else 2)
    return (
        f"vocab_size is {shape.vocab_size:,}, but the tokenizer has {ids:,} ids: {parameters:,} parameters "
        f"are never used, which cost {parameters * TRAINING_BYTES / 1e9:.2g} GB in training and a larger "
        f"output layer; leave vocab_size out, or set it to {ids}"
    )


def is_pretrained(init_from: str) -> bool:
    """Whether a run starts from pretrained weights."""
    return init_from not in ("scratch", "resume")


def load_pretrained_model(
    source: str, settings: ModelConfig, corpora: Sequence[str] = (), adapter: str | None = None
) -> Transformer:
    """Load pretrained weights, with the dropout, context and adapters that are set.

    Args:
        source: A folder, a checkpoint or a hub name.
        settings: What is set of the model.
        corpora: Names of the data's corpora, which domain adapters are named after unless that is set.
        adapter: A PEFT folder to load on top.

    Raises:
        UsageError: If another shape is set than the weights have.
        CheckpointError: If there are no weights.
    """
    from llm_trainer.inference.load_model import load_transformer, resolve_model

    loaded = load_transformer(resolve_model(source))
    shape = _with_changes(source, loaded.config, settings)
    model = loaded if shape.model_dump() == loaded.config.model_dump() else _reshaped(loaded, shape)
    return _with_adapters(model, settings, corpora, adapter)


def pretrained_model_config(source: str, settings: ModelConfig, adapter: str | None = None) -> ModelConfig:
    """The shape of what `load_pretrained_model` returns, without loading weights. Raises as it does."""
    import torch

    from llm_trainer.inference.load_model import read_model_config
    from llm_trainer.model.hf.checkpoint import empty_model

    model = empty_model(_with_changes(source, read_model_config(source), settings), "meta")
    with torch.device("meta"):
        return _with_adapters(model, settings, (), adapter).config


def load_matching_weights(model: Transformer, source: str, modules: Sequence[str]) -> list[str]:
    """Copy the weights of another model where they fit.

    Args:
        model: The model to change.
        source: A folder, a checkpoint or a hub name.
        modules: Names or patterns of the modules to take.

    Returns:
        Lines that say what was taken.
    """
    from llm_trainer.inference.load_model import resolve_model
    from llm_trainer.model.interop.partial_load import load_partially

    return load_partially(model, resolve_model(source), modules).lines()


def check_adapter_has_base(training: TrainingConfig) -> None:
    """Check that an adapter is trained over pretrained weights.

    Raises:
        UsageError: If `adapter_from` is set without `init_from`.
    """
    if training.adapter_from is not None and training.init_from == "scratch":
        raise UsageError(
            f"adapter_from={training.adapter_from} needs the weights that it was trained over; name them "
            "with --init_from"
        )


def check_domain_adapters(model: ModelConfig, training: TrainingConfig, corpora: Sequence[str]) -> None:
    """Check that adapters of several domains are trained on data with domain labels: no row would use one
    else.

    Args:
        model: The shape.
        training: The settings, which may freeze the adapters.
        corpora: Names of the data's corpora.

    Raises:
        UsageError: If the data has none.
    """
    from llm_trainer.training.optim.param_groups import trainable_sizes

    if len(model.domain_names) < 2 or corpora or training.eval_only:
        return
    trained = trainable_sizes(model, training).items()
    if any(size and module.startswith("domain_adapter.") for module, size in trained):
        raise UsageError(
            f"the model has adapters for {', '.join(model.domain_names)}, but the data has no domain labels; "
            "train on a mixture (mixture.json) whose corpora have these names, or freeze the adapters with "
            "--freeze_layers 'domain_adapter.*'"
        )


def check_same_tokenizer(source: str, tokenizer: Tokenizer | None) -> None:
    """Check that the data's ids mean what they meant to the pretrained model.

    Args:
        source: A folder, a checkpoint or a hub name.
        tokenizer: The data's tokenizer.

    Raises:
        DataError: An id stands for different bytes, or the model's folder has no tokenizer to compare with.
    """
    from llm_trainer.inference.load_model import load_tokenizer, resolve_model

    if tokenizer is None:
        return
    try:
        learned = load_tokenizer(resolve_model(source))
    except DataError as error:
        raise DataError(
            f"the data's token ids cannot be compared with those that {source} was trained on: {error}. If "
            "the data was prepared with that model's tokenizer, copy the data's tokenizer.json into the "
            "folder of the model"
        ) from None
    if learned.hash == tokenizer.hash:
        return
    for token in range(min(tokenizer.vocab_size, learned.vocab_size)):
        here, there = tokenizer.token_bytes(token), learned.token_bytes(token)
        if here != there:
            raise DataError(
                f"the data was prepared with another tokenizer than that of {source}: id {token} is {here!r} "
                f"in the data and {there!r} there; prepare it with --tokenizer_path {source}"
            )
    if tokenizer.prefix_ids != learned.prefix_ids:
        raise DataError(
            f"every text of {source} begins with the ids {list(learned.prefix_ids)}, and those of the data "
            f"with {list(tokenizer.prefix_ids)}; prepare it with --tokenizer_path {source}"
        )


def read_generation_defaults(source: str) -> GenerationDefaults:
    """What the folder of pretrained weights says about generation.

    Args:
        source: A folder, a checkpoint or a hub name.

    Raises:
        CheckpointError: Its files are damaged.
    """
    from llm_trainer.inference.load_model import resolve_model
    from llm_trainer.model.hf.generation_config import GenerationDefaults

    folder = resolve_model(source)
    return GenerationDefaults.read(folder) if folder.is_dir() else GenerationDefaults()


def corpus_names(prepared: PreparedDataset) -> list[str]:
    """Names of the corpora of a mixture; empty for other data."""
    from llm_trainer.data.sampling.mixture import MixtureDataset

    return list(prepared.train.members) if isinstance(prepared.train, MixtureDataset) else []


def _domains(settings: ModelConfig, corpora: Sequence[str]) -> list[str]:
    """The domains that get adapters: those that are set, else the corpora of a mixture."""
    return list(settings.adapter_domains or corpora) if settings.use_domain_adaptation else []


def _with_changes(source: str, shape: ModelConfig, settings: ModelConfig) -> ModelConfig:
    changed = shape.model_copy()
    for name in sorted(settings.model_fields_set - {"model_type", *LORA, *BOTTLENECKS}):
        wanted, present = getattr(settings, name), getattr(shape, name)
        is_shorter = name == "max_position_embeddings" and wanted < present
        if name in CHANGEABLE or is_shorter:
            setattr(changed, name, wanted)
        elif wanted != present:
            raise UsageError(
                f"{name} is set to {wanted!r}, but {source} has {present!r}; leave it out, or train from "
                "scratch"
            )
    return changed


def _with_adapters(
    model: Transformer, settings: ModelConfig, corpora: Sequence[str], adapter: str | None
) -> Transformer:
    """The model with all its adapters: those that are set, and those of a PEFT folder."""
    model = _with_bottleneck_adapters(model, settings, corpora)
    if adapter is not None:
        from llm_trainer.model.interop.peft_format import load_adapter

        load_adapter(model, adapter)
    return _with_lora_adapters(model, settings)


def _with_bottleneck_adapters(
    model: Transformer, settings: ModelConfig, corpora: Sequence[str]
) -> Transformer:
    """The same weights in a model that has the bottleneck adapters that are set in addition to its own.

    Raises UsageError if its own differ from what is set.
    """
    from llm_trainer.model.adapters.lora import is_adapter_parameter
    from llm_trainer.model.transformer import Transformer

    present = model.config
    kinds = {
        name: getattr(present, name) or getattr(settings, name)
        for name in ("use_adapter_modules", "use_domain_adaptation")
    }
    own: dict[str, object] = {name: True for name in kinds if getattr(present, name)}
    own |= {"adapter_size": present.adapter_size} if own else {}
    own |= {"adapter_domains": present.domain_names} if present.use_domain_adaptation else {}
    for name, value in own.items():
        if settings.is_set(name) and getattr(settings, name) not in ([], value):
            raise _other_adapter(
                name, getattr(settings, name), f"the bottleneck adapters of the weights have {value!r}", ""
            )
    if all(getattr(present, name) == value for name, value in kinds.items()):
        return model
    wanted = (
        {"adapter_size": settings.adapter_size, "adapter_domains": _domains(settings, corpora)} | kinds | own
    )
    renewed = Transformer(present.model_copy(update=wanted)).train(model.training)
    left = renewed.load_state_dict(model.state_dict(), strict=False)
    assert not left.unexpected_keys, "a model with adapters has all that it has without"
    assert all(map(is_adapter_parameter, left.missing_keys)), "the adapters are all that is new"
    return renewed


def _with_lora_adapters(model: Transformer, settings: ModelConfig) -> Transformer:
    """The model with the low-rank adapters that were settings, over weights that stay as they are unless
    `lora_train_base` says otherwise.

    Raises UsageError where a set that it has is another than was settings.
    """
    from llm_trainer.model.adapters.lora import add_adapters, set_adapters

    _check_same_lora(model, settings)
    for name in SINGLE_LORA:
        if settings.is_set(name):
            setattr(model.config, name, getattr(settings, name))
    wanted = (
        model.config.model_copy(update={"lora": {**model.config.lora, **settings.lora}})
        .with_lora_tables()
        .lora
    )
    for name, table in wanted.items():
        if name not in model.config.lora:
            add_adapters(model, name, table)
    if settings.active_adapters is not None:
        set_adapters(model, settings.active_adapters)
    if model.config.has_adapters and model.config.lora_train_base is None:
        model.config.lora_train_base = False
    return model


def _check_same_lora(model: Transformer, settings: ModelConfig) -> None:
    """Raises UsageError if a LoRA adapter of the model differs from what is set."""
    for name, present in model.config.lora.items():
        instead = ", or give a new adapter another name (model.lora)"
        found = _lora_values(model, present)
        if name in settings.lora:
            wanted = _lora_values(
                model,
                settings.lora[name].with_tied_head()
                if model.config.tie_word_embeddings
                else settings.lora[name],
            )
            if wanted != found:
                raise _other_adapter(
                    f"model.lora.{name}",
                    settings.lora[name].ranks,
                    f"the adapter {name!r} of the weights is different",
                    instead,
                )
        elif name == DEFAULT_ADAPTER:  # described by the single settings
            shared = settings.embedding_lora_rank or settings.head_lora_rank
            tied = (
                dict.fromkeys(("embedding_lora_rank", "head_lora_rank"), shared)
                if model.config.tie_word_embeddings
                else {}
            )
            for setting, values in found.items():
                value = tied.get(setting, getattr(settings, setting))
                if settings.is_set(setting) and value is not None and set(values) != {value}:
                    there = ", ".join(f"{one:g}" for one in dict.fromkeys(values))
                    raise _other_adapter(
                        setting, value, f"the adapter {name!r} of the weights has {there or 'none'}", instead
                    )


def _lora_values(model: Transformer, table: LoraConfig) -> dict[str, list[float]]:
    """The values of an adapter under the names of its settings, for each matrix in order."""
    from llm_trainer.model.adapters.lora import lora_targets

    shared = "wte" if model.config.tie_word_embeddings else "lm_head"
    names = [shared if target.name == "lm_head" else target.name for target in lora_targets(model)]
    kinds = {
        "attn_lora_rank": "attn",
        "mlp_lora_rank": "mlp",
        "embedding_lora_rank": "wte",
        "head_lora_rank": shared,
    }
    ranks: dict[str, list[float]] = {
        setting: [table.rank_of(name) for name in names if name.partition(".")[0] == kind]
        for setting, kind in kinds.items()
    }
    strengths = [round(table.alpha_of(name), 6) for name in names if table.rank_of(name)]
    return {
        **ranks,
        "lora_alpha": strengths,
        "lora_dropout": [table.dropout],
        "use_rslora": [table.use_rslora],
    }


def _other_adapter(name: str, value: object, there: str, instead: str) -> UsageError:
    return UsageError(f"{name} is set to {value!r}, but {there}; leave it out{instead}")


def _reshaped(model: Transformer, shape: ModelConfig) -> Transformer:
    """The same weights with another dropout or a shorter context; learned positions past it are dropped."""
    from llm_trainer.model.hf.checkpoint import empty_model

    weights = model.state_dict()
    if "wpe.weight" in weights:
        weights["wpe.weight"] = weights["wpe.weight"][: shape.max_position_embeddings]
    renewed = empty_model(shape)
    renewed.load_state_dict(weights)
    return renewed


def _is_chosen(model: ModelConfig, name: str, origins: Mapping[str, str]) -> bool:
    """Whether the user set it; a preset's vocabulary and context are suggestions."""
    return model.is_set(name) and not is_suggested(f"model.{name}", origins)
