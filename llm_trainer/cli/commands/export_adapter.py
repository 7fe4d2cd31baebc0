"""`llm-trainer adapter MODEL`: a model's low-rank adapters as a folder of PEFT's, or folded into its matrices
as a plain model.

An adapter is worth something over its own base alone. So the base that the folder names is compared with the
weights under the adapter, tensor by tensor, unless it was said outright; where they have been trained too,
the base is to be written beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.cli.scripts import ADAPTER, AdapterOptions
from llm_trainer.cli.setup.parse_command import parse_command
from llm_trainer.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from llm_trainer.model.transformer import Transformer


def run(argv: list[str]) -> int:
    """Write what was asked for and say where it is."""
    loaded = parse_command(ADAPTER, argv)
    if loaded is None:
        return 0
    assert isinstance(loaded.options, AdapterOptions)
    own, inference = loaded.options, loaded.config.inference
    if inference.model is None:
        raise UsageError(
            "no model is named: give --model with a run folder, a checkpoint or the name of a model on the hub"
        )
    for folder in (own.merged_output, own.base_output, own.output if own.merged_output is None else None):
        _refuse_filled(folder)
    from llm_trainer.inference.load_model import load_transformer, resolve_model

    source = resolve_model(inference.model)
    model = load_transformer(source)
    name = chosen_adapter(model, inference.adapter)
    if own.merged_output is not None:
        _write_merged(model, name, source, Path(own.merged_output))
    else:
        _write_adapter(model, name, source, own)
    return 0


def chosen_adapter(model: Transformer, said: str | None) -> str:
    """The set that is meant: by its name, read from a folder of PEFT's, or the only one that counts. Raises
    UsageError where it is none.
    """
    from llm_trainer.model.adapters.lora import active_adapters
    from llm_trainer.model.interop.peft_format import is_adapter_folder, load_adapter

    known = list(model.config.lora)
    meant = active_adapters(model) or known
    if said is None and len(meant) == 1:
        return meant[0]
    if said is not None and said not in known and is_adapter_folder(said):
        load_adapter(model, said, "folder")
        return "folder"
    if said in known:
        return said
    there = (
        f"those that it has: {', '.join(known)}"
        if known
        else "it has none; train with --attn_lora_rank, or name a folder of PEFT's"
    )
    wanted = (
        "several adapters, of which --adapter names one"
        if said is None and known
        else f"no adapter{f' {said!r}' if said else ''}"
    )
    raise UsageError(f"the model has {wanted}; {there}")


def _write_merged(model: Transformer, name: str, source: Path, folder: Path) -> None:
    from llm_trainer.model.adapters.lora import merge_lora

    merge_lora(model, [name], restart=False)
    _write_plain(model, source, folder)
    print(f"{folder}: the model with {name!r} in its matrices")


def _write_adapter(model: Transformer, name: str, source: Path, own: AdapterOptions) -> None:
    from llm_trainer.model.interop.peft_format import save_adapter

    base = own.base or own.base_output or _base_of(model, source)
    save_adapter(model, own.output, name, base=base)
    if own.base_output is not None:
        _write_plain(model, source, Path(own.base_output))
        print(f"{own.base_output}: the model without adapters")
    print(f"{own.output}: adapter {name!r} over {base}")


def _write_plain(model: Transformer, source: Path, folder: Path) -> None:
    """The model without (further) adapters, with its tokenizer where there is one."""
    from llm_trainer.data.tokenization.tokenizer import TOKENIZER_FILE, Tokenizer
    from llm_trainer.model.adapters.lora import remove_adapters
    from llm_trainer.model.hf.checkpoint import save_pretrained

    for name in list(model.config.lora):
        remove_adapters(model, name)
    tokenizer = Tokenizer.load(source) if source.is_dir() and (source / TOKENIZER_FILE).is_file() else None
    save_pretrained(model, folder, eos_id=tokenizer.eos_id if tokenizer else None)
    if tokenizer is not None:
        tokenizer.save(folder)


def _base_of(model: Transformer, source: Path) -> str:
    """What the run of a checkpoint began from, where that is what lies under its adapters still. Raises
    UsageError where it is not.
    """
    from llm_trainer.config.saved_run import read_run_config

    way_out = "write the base too with --base_output FOLDER, or name what peft shall open with --base"
    try:
        began = read_run_config(source).training.init_from
    except CheckpointError as error:
        raise UsageError(f"what lies under the adapter is not known ({error}); {way_out}") from error
    if began in ("scratch", "resume"):
        raise UsageError(f"the run names no pretrained weights that lie under its adapter; {way_out}")
    if (other := _differs(model, began)) is not None:
        raise UsageError(
            f"{other} under the adapter is not that of {began}, which the run began from; {way_out}"
        )
    return began


def _differs(model: Transformer, base: str) -> str | None:
    """The first tensor that is another than the base's; None where all are the same."""
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


def _refuse_filled(folder: str | None) -> None:
    """Raises UsageError for a folder with files in it, unless they are an adapter of before."""
    from llm_trainer.model.interop.peft_format import is_adapter_folder

    if (
        folder is not None
        and Path(folder).is_dir()
        and any(Path(folder).iterdir())
        and not is_adapter_folder(folder)
    ):
        raise UsageError(f"{folder} holds files already; give a new folder")
