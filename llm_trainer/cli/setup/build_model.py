"""Which model a run trains: from scratch in the shape that is said, or from somebody's weights.

The vocabulary and the context come from the data where they are not said: an embedding smaller than the
tokenizer is an error here, before the first step, instead of a wrong index in the middle of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llm_trainer.config import DataConfig, DataError, ModelConfig, TrainingConfig, UsageError
from llm_trainer.config.schema.lora import DEFAULT_NAME, LoraConfig

if TYPE_CHECKING:
    from llm_trainer.data.prepared_dataset import PreparedData
    from llm_trainer.data.tokenization.tokenizer import Tokenizer
    from llm_trainer.model.transformer import Transformer

# What may be said beside pretrained weights; everything else is the weights' own shape.
CHANGEABLE = (
    "dropout",
    "attention_dropout",
    "embedding_dropout",
    "gradient_checkpointing",
    "checkpoint_every",
    "checkpoint_keep",
)

# Low-rank adapters: the settings beside a table, and with the tables themselves.
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
LORA = (*SINGLE_LORA, "lora", "lora_in_use")
BOTTLENECKS = ("use_adapter_modules", "use_domain_adaptation", "adapter_size", "adapter_domains")


def shape_for(model: ModelConfig, prepared: PreparedData, origins: Mapping[str, str]) -> ModelConfig:
    """The shape to train on this data from scratch. Raises UsageError where the vocabulary that was said is
    too small.
    """
    settled = model.model_copy()
    rows, needed = model.vocab_size, prepared.vocab_size
    if not _is_said(model, "vocab_size", origins):
        settled.vocab_size = needed
    elif rows < needed:
        raise UsageError(
            f"the tokenizer has {needed} ids, but the embedding has {rows} rows: "
            f"model.vocab_size ({origins.get('model.vocab_size', 'default')}); "
            f"set vocab_size to {needed} or leave it out, or prepare the data with a smaller vocabulary"
        )
    if prepared.metadata.max_length is not None and not _is_said(model, "max_position_embeddings", origins):
        settled.max_position_embeddings = prepared.metadata.max_length
    settled.adapter_domains = _domains(model, corpora_of(prepared))
    return settled


def new_model(shape: ModelConfig, seed: int) -> Transformer:
    """A model with seeded initial weights."""
    import torch

    from llm_trainer.model.transformer import Transformer

    model = Transformer(shape, torch.Generator().manual_seed(seed))
    if model.config.has_adapters and model.config.lora_train_base is None:
        model.config.lora_train_base = True  # random weights are worth nothing yet
    return model


def pretrained_model(
    source: str, said: ModelConfig, corpora: Sequence[str] = (), adapter: str | None = None
) -> Transformer:
    """The model of a folder, a checkpoint or a hub name, with the dropout, context and adapters that were
    said.

    `corpora` are those of the data's mixture, which domain adapters are named after where nothing else was said; `adapter` is a folder
    of PEFT's. Raises UsageError where another shape was said than the weights have, CheckpointError where there are no weights.
    """
    from llm_trainer.inference.load_model import find_model, load_transformer

    loaded = load_transformer(find_model(source))
    shape = _with_changes(source, loaded.config, said)
    model = loaded if shape.model_dump() == loaded.config.model_dump() else _reshaped(loaded, shape)
    return _with_adapters(model, said, corpora, adapter)


def pretrained_shape(source: str, said: ModelConfig, adapter: str | None = None) -> ModelConfig:
    """The configuration of what `pretrained_model` gives, without its weights. Raises as that."""
    import torch

    from llm_trainer.inference.load_model import find_description
    from llm_trainer.model.hf.checkpoint import empty_model

    described = empty_model(_with_changes(source, find_description(source), said), "meta")
    with torch.device("meta"):
        return _with_adapters(described, said, (), adapter).config


def transferred(model: Transformer, source: str, parts: Sequence[str]) -> list[str]:
    """Take what fits of another model's weights; returns what to tell of it."""
    from llm_trainer.inference.load_model import find_model
    from llm_trainer.model.interop.partial_load import load_partially

    return load_partially(model, find_model(source), parts).lines()


def refuse_adapter_over_nothing(training: TrainingConfig) -> None:
    """Raises UsageError for an adapter that is to be trained on over no pretrained weights."""
    if training.adapter_from is not None and training.init_from == "scratch":
        raise UsageError(
            f"adapter_from={training.adapter_from} needs the weights that it was trained over; name them with --init_from"
        )


def refuse_untold_domains(model: ModelConfig, training: TrainingConfig, corpora: Sequence[str]) -> None:
    """Raises UsageError for adapters of several domains that are to be trained on data that tells none apart:
    no row would take one.
    """
    from llm_trainer.training.optim.param_groups import trained_sizes

    if len(model.domain_names) < 2 or corpora or training.eval_only:
        return
    if any(
        trained and part.startswith("domain_adapter.")
        for part, trained in trained_sizes(model, training).items()
    ):
        raise UsageError(
            f"the model has adapters for {', '.join(model.domain_names)}, but the data is no mixture, so nothing says whose a text is; "
            "train on a mixture of corpora with these names (mixture.json), or let them be with --freeze_layers 'domain_adapter.*'"
        )


def is_pretrained(init_from: str) -> bool:
    """Whether a run starts from somebody's weights."""
    return init_from not in ("scratch", "resume")


def use_tokenizer_of(source: str, data: DataConfig) -> None:
    """Text that is prepared for a pretrained model is prepared with that model's tokenizer, unless another
    one was said.
    """
    if (
        data.tokenizer_path is None
        and data.tokenizer_type == "auto"
        and (data.input is not None or data.dataset_name is not None)
    ):
        from llm_trainer.inference.load_model import find_model

        folder = find_model(source)
        if (folder / "tokenizer.json").is_file():
            data.tokenizer_path = str(folder)


def refuse_other_tokens(source: str, tokenizer: Tokenizer | None) -> None:
    """Raises DataError where the data's ids mean other text than the ids that the pretrained model has
    learned.
    """
    from llm_trainer.data.tokenization.tokenizer import Tokenizer
    from llm_trainer.inference.load_model import find_model

    folder = find_model(source)
    if tokenizer is None or not (folder / "tokenizer.json").is_file():
        return
    learned = Tokenizer.load(folder)
    for token in range(min(tokenizer.vocab_size, learned.vocab_size)):
        here, there = tokenizer.token_bytes(token), learned.token_bytes(token)
        if here != there:
            raise DataError(
                f"the data was prepared with another tokenizer than that of {source}: id {token} is {here!r} in the data and {there!r} "
                f"there; prepare it with --tokenizer_path {source}"
            )


def _with_changes(source: str, shape: ModelConfig, said: ModelConfig) -> ModelConfig:
    changed = shape.model_copy()
    for name in sorted(said.model_fields_set - {"model_type", *LORA, *BOTTLENECKS}):
        wanted, present = getattr(said, name), getattr(shape, name)
        shorter = name == "max_position_embeddings" and wanted < present
        if name in CHANGEABLE or shorter:
            setattr(changed, name, wanted)
        elif wanted != present:
            raise UsageError(
                f"{name}={wanted!r} was said, but {source} has {present!r}; leave it out, or train from scratch"
            )
    return changed


def corpora_of(prepared: PreparedData) -> list[str]:
    """Names of the corpora of a mixture; none for other data."""
    from llm_trainer.data.sampling.mixture import TokenMixture

    return list(prepared.train.members) if isinstance(prepared.train, TokenMixture) else []


def _domains(said: ModelConfig, corpora: Sequence[str]) -> list[str]:
    """The domains that get adapters: those that were said, else the corpora of a mixture."""
    return list(said.adapter_domains or corpora) if said.use_domain_adaptation else []


def _with_adapters(
    model: Transformer, said: ModelConfig, corpora: Sequence[str], adapter: str | None
) -> Transformer:
    """The model with all adapters that it shall have: those that were said, and those in a folder of PEFT's."""
    model = _with_said_bottlenecks(model, said, corpora)
    if adapter is not None:
        from llm_trainer.model.interop.peft_format import load_adapter

        load_adapter(model, adapter)
    return _with_said_adapters(model, said)


def _with_said_bottlenecks(model: Transformer, said: ModelConfig, corpora: Sequence[str]) -> Transformer:
    """The same weights in a model that has the bottleneck adapters that were said beside its own, which stay.

    Raises UsageError where its own are others than was said.
    """
    from llm_trainer.model.adapters.lora import is_adapter_parameter
    from llm_trainer.model.transformer import Transformer

    present = model.config
    kinds = {
        name: getattr(present, name) or getattr(said, name)
        for name in ("use_adapter_modules", "use_domain_adaptation")
    }
    own: dict[str, object] = {name: True for name in kinds if getattr(present, name)}
    own |= {"adapter_size": present.adapter_size} if own else {}
    own |= {"adapter_domains": present.domain_names} if present.use_domain_adaptation else {}
    for name, value in own.items():
        if said.is_said(name) and getattr(said, name) not in ([], value):
            raise _other_adapter(
                name, getattr(said, name), f"the bottleneck adapters of the weights have {value!r}", ""
            )
    if all(getattr(present, name) == value for name, value in kinds.items()):
        return model
    wanted = {"adapter_size": said.adapter_size, "adapter_domains": _domains(said, corpora)} | kinds | own
    renewed = Transformer(present.model_copy(update=wanted)).train(model.training)
    left = renewed.load_state_dict(model.state_dict(), strict=False)
    assert not left.unexpected_keys, "a model with adapters has all that it has without"
    assert all(map(is_adapter_parameter, left.missing_keys)), "the adapters are all that is new"
    return renewed


def _with_said_adapters(model: Transformer, said: ModelConfig) -> Transformer:
    """The model with the low-rank adapters that were said, over weights that stay as they are unless
    `lora_train_base` says otherwise.

    Raises UsageError where a set that it has is another than was said.
    """
    from llm_trainer.model.adapters.lora import add_adapters, use_adapters

    _refuse_other_lora(model, said)
    for name in SINGLE_LORA:
        if said.is_said(name):
            setattr(model.config, name, getattr(said, name))
    wanted = (
        model.config.model_copy(update={"lora": {**model.config.lora, **said.lora}}).with_lora_table().lora
    )
    for name, table in wanted.items():
        if name not in model.config.lora:
            add_adapters(model, name, table)
    if said.lora_in_use is not None:
        use_adapters(model, said.lora_in_use)
    if model.config.has_adapters and model.config.lora_train_base is None:
        model.config.lora_train_base = False
    return model


def _refuse_other_lora(model: Transformer, said: ModelConfig) -> None:
    """Raises UsageError where a set of low-rank adapters that is there is another than was said."""
    for name, present in model.config.lora.items():
        way_out = ", or give a new set another name (model.lora)"
        found = _lora_values(model, present)
        if name in said.lora:
            wanted = _lora_values(
                model,
                said.lora[name].with_tied_head() if model.config.tie_word_embeddings else said.lora[name],
            )
            if wanted != found:
                raise _other_adapter(
                    f"model.lora.{name}",
                    said.lora[name].ranks,
                    f"the weights' adapter {name!r} is another",
                    way_out,
                )
        elif name == DEFAULT_NAME:  # which the single settings describe
            shared = said.embedding_lora_rank or said.head_lora_rank
            tied = (
                dict.fromkeys(("embedding_lora_rank", "head_lora_rank"), shared)
                if model.config.tie_word_embeddings
                else {}
            )
            for setting, values in found.items():
                value = tied.get(setting, getattr(said, setting))
                if said.is_said(setting) and value is not None and set(values) != {value}:
                    there = ", ".join(f"{one:g}" for one in dict.fromkeys(values))
                    raise _other_adapter(
                        setting, value, f"the adapter {name!r} that is there has {there or 'none'}", way_out
                    )


def _lora_values(model: Transformer, table: LoraConfig) -> dict[str, list[float]]:
    """What a set of low-rank adapters is, under the names of the settings for it; of each matrix in order."""
    from llm_trainer.model.adapters.lora import targets

    shared = "wte" if model.config.tie_word_embeddings else "lm_head"
    names = [shared if target.name == "lm_head" else target.name for target in targets(model)]
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
    strengths = [round(table.strength_of(name), 6) for name in names if table.rank_of(name)]
    return {
        **ranks,
        "lora_alpha": strengths,
        "lora_dropout": [table.dropout],
        "use_rslora": [table.use_rslora],
    }


def _other_adapter(name: str, value: object, there: str, way_out: str) -> UsageError:
    return UsageError(f"{name}={value!r} was said, but {there}; leave it out{way_out}")


def _reshaped(model: Transformer, shape: ModelConfig) -> Transformer:
    """The same weights under another dropout or a shorter context (learned positions past it are cut off)."""
    from llm_trainer.model.hf.checkpoint import empty_model

    weights = model.state_dict()
    if "wpe.weight" in weights:
        weights["wpe.weight"] = weights["wpe.weight"][: shape.max_position_embeddings]
    renewed = empty_model(shape)
    renewed.load_state_dict(weights)
    return renewed


def _is_said(model: ModelConfig, name: str, origins: Mapping[str, str]) -> bool:
    """Whether the user gave it; a preset's vocabulary and context are suggestions."""
    return model.is_said(name) and not origins.get(f"model.{name}", "").startswith("preset")
