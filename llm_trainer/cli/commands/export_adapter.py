"""`llm-trainer export-adapter MODEL`: writes a LoRA adapter as a PEFT folder, or merges it into the model.

An adapter is only useful with its own base. So the base that the PEFT folder names is compared with the
weights under the adapter, tensor by tensor, unless `--base` names it. Where the base was trained too, it has
to be written with `--base_output`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.cli.setup.parse_command import named_model, parse_command
from llm_trainer.cli.specs import EXPORT_ADAPTER, AdapterOptions
from llm_trainer.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from llm_trainer.model.transformer import Transformer


def run(argv: list[str]) -> int:
    """Write the adapter or the merged model, and print where; returns the exit code."""
    loaded = parse_command(EXPORT_ADAPTER, argv)
    if loaded is None:
        return 0
    assert isinstance(loaded.options, AdapterOptions)
    own, inference = loaded.options, loaded.config.inference
    named = named_model(inference)
    for folder in (own.merged_output, own.base_output, own.output if own.merged_output is None else None):
        _check_empty(folder)
    from llm_trainer.inference.load_model import load_transformer, resolve_model

    source = resolve_model(named)
    model = load_transformer(source)
    name = select_adapter(model, inference.adapter)
    if own.merged_output is not None:
        _write_merged(model, name, source, Path(own.merged_output))
    else:
        _write_adapter(model, name, source, own)
    return 0


def select_adapter(model: Transformer, requested: str | None) -> str:
    """The adapter to export: by its name, from a PEFT folder, or the only active one.

    Args:
        model: The model. An adapter from a PEFT folder is loaded into it.
        requested: What `--adapter` says.

    Returns:
        The adapter's name in the model.

    Raises:
        UsageError: If there is no such adapter, or several to choose from.
    """
    from llm_trainer.model.adapters.lora import active_adapters
    from llm_trainer.model.interop.peft_format import is_adapter_folder, load_adapter

    known = list(model.config.lora)
    candidates = active_adapters(model) or known
    if requested is None and len(candidates) == 1:
        return candidates[0]
    if requested is not None and requested not in known and is_adapter_folder(requested):
        load_adapter(model, requested, "folder")
        return "folder"
    if requested in known:
        return requested
    if requested is None and known:
        raise UsageError(f"the model has several adapters ({', '.join(known)}); choose one with --adapter")
    available = (
        f"it has {', '.join(known)}"
        if known
        else "it has none; train with --attn_lora_rank, or name a PEFT folder"
    )
    name = "adapter" if requested is None else f"adapter {requested!r}"
    raise UsageError(f"the model has no {name}; {available}")


def _write_merged(model: Transformer, name: str, source: Path, folder: Path) -> None:
    from llm_trainer.model.adapters.lora import merge_lora

    merge_lora(model, [name], restart=False)
    _write_plain(model, source, folder)
    print(f"wrote {folder}: the model with adapter {name!r} merged")


def _write_adapter(model: Transformer, name: str, source: Path, own: AdapterOptions) -> None:
    from llm_trainer.model.interop.peft_format import save_adapter

    base = own.base or own.base_output or _base_of(model, source)
    save_adapter(model, own.output, name, base=base)
    if own.base_output is not None:
        _write_plain(model, source, Path(own.base_output))
        print(f"wrote {own.base_output}: the model without adapters")
    print(f"wrote {own.output}: adapter {name!r} for {base}")


def _write_plain(model: Transformer, source: Path, folder: Path) -> None:
    """Write the model without adapters, with its tokenizer if it has one."""
    from llm_trainer.data.tokenization.slow_files import has_tokenizer_files
    from llm_trainer.data.tokenization.tokenizer import TOKENIZER_FILE, Tokenizer
    from llm_trainer.model.adapters.lora import remove_adapters
    from llm_trainer.model.hf.checkpoint import save_pretrained
    from llm_trainer.model.hf.generation_config import GenerationDefaults

    for name in list(model.config.lora):
        remove_adapters(model, name)
    has_tokenizer = (source / TOKENIZER_FILE).is_file() or has_tokenizer_files(source)
    tokenizer = Tokenizer.load(source) if source.is_dir() and has_tokenizer else None
    save_pretrained(
        model,
        folder,
        bos_id=tokenizer.bos_id if tokenizer else None,
        eos_id=tokenizer.eos_id if tokenizer else None,
        pad_id=tokenizer.pad_id if tokenizer else None,
        generation=GenerationDefaults.read(source) if source.is_dir() else None,
    )
    if tokenizer is not None:
        tokenizer.save(folder)


def _base_of(model: Transformer, source: Path) -> str:
    """The model that a checkpoint's run started from, if the weights under the adapter are still the same.

    Raises UsageError if they are not.
    """
    from llm_trainer.config.saved_run import read_run_config

    instead = "write the base too with --base_output FOLDER, or name it with --base"
    try:
        source_model = read_run_config(source).training.init_from
    except CheckpointError as error:
        raise UsageError(f"the base of the adapter is not known ({error}); {instead}") from error
    if source_model in ("scratch", "resume"):
        raise UsageError(f"the run did not start from pretrained weights; {instead}")
    if (other := _differs(model, source_model)) is not None:
        raise UsageError(f"{other} differs from {source_model}, which the run started from; {instead}")
    return source_model


def _differs(model: Transformer, base: str) -> str | None:
    """The first tensor that differs from the base's; None if all are equal."""
    import torch

    from llm_trainer.inference.load_model import load_transformer, resolve_model

    theirs = dict(load_transformer(resolve_model(base)).named_parameters())
    held = {name: one for name, one in model.named_parameters() if ".lora." not in name}
    pairs = [(name, theirs.get(name), one) for name, one in held.items()]
    return next(
        (
            name
            for name, one, other in pairs
            if one is None or one.shape != other.shape or not torch.equal(one, other)
        ),
        None,
    )


def _check_empty(folder: str | None) -> None:
    """Raises UsageError for a folder with files in it, unless they are an earlier adapter."""
    from llm_trainer.model.interop.peft_format import is_adapter_folder

    if (
        folder is not None
        and Path(folder).is_dir()
        and any(Path(folder).iterdir())
        and not is_adapter_folder(folder)
    ):
        raise UsageError(f"{folder} is not empty; give a new folder")
