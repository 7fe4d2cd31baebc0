"""`load_model`: from what a person calls a model to one that answers.

`device="auto"` is the accelerator where there is one, else the CPU. `precision="auto"` is fp32 on a CPU, where answers are then
those of training's validation, and bf16 (fp16 on older cards) on a GPU, which is made for it. On a CPU bf16 is half the memory and,
with AMX or AVX512-BF16, the faster one (docs/generation.md), but it rounds, and so it has to be asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.data.nanogpt_format import META_FILE, read_vocabulary
from llm_trainer.data.tokenization.tokenizer import TOKENIZER_FILE, Tokenizer
from llm_trainer.errors import CheckpointError, DataError, UsageError
from llm_trainer.inference.engine import LanguageModel
from llm_trainer.model.hf.checkpoint import (
    MODEL_FILES,
    SHORT_NAMES,
    fetch_from_hub,
    load_pretrained,
    read_config,
)
from llm_trainer.model.transformer import Transformer
from llm_trainer.run_dir import resolve_model_folder

__all__ = [
    "LanguageModel",
    "find_model",
    "load_model",
    "load_tokenizer",
    "load_transformer",
    "resolve_device",
    "resolve_dtype",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PICKLES = (".pt", ".pth", ".ckpt")
WITHOUT_ADAPTER = "base"
DATA_FOLDER = Path("data")  # nanoGPT's, from where one stands


def load_model(
    path: str | Path,
    device: str = "auto",
    precision: str = "auto",
    compile: str = "auto",
    adapter: str | None = None,
) -> tuple[LanguageModel, Tokenizer]:
    """A model and its tokenizer from a run folder, a checkpoint by any of its spellings, nanoGPT's `ckpt.pt`,
    or a name on the hub.

    precision: auto, fp32, bf16 or fp16; compile: auto, on or off (see `inference.steps`); adapter: the set of
    low-rank adapters to answer with, by its name in the model or as a folder of PEFT's (none: the model's
    default; `base`: none). They are merged into the matrices, so that answers cost what the plain model's do.
    Raises CheckpointError where there is no whole model, DataError where its tokenizer is missing, UsageError
    for a device or precision that this machine does not have.
    """
    place = torch.device(resolve_device(device))
    dtype = resolve_dtype(precision, place)
    source = find_model(str(path))
    tokenizer = load_tokenizer(source)
    model = load_transformer(source, place, dtype)
    _merge_adapters(model, adapter)
    return LanguageModel(model, tokenizer, end_ids=_end_ids(source, tokenizer), compile=compile), tokenizer


def load_transformer(
    source: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer:
    """The network in a folder that `find_model` found, or in nanoGPT's file."""
    if source.suffix in PICKLES:
        from llm_trainer.model.interop.nanogpt_import import load_nanogpt

        return load_nanogpt(source).to(device=device, dtype=dtype).eval()
    return load_pretrained(source, device, dtype)


def _merge_adapters(model: Transformer, adapter: str | None) -> None:
    """Leave a plain model that computes what the chosen adapters do; raises UsageError for some that the
    model does not have.
    """
    if adapter is None and not model.config.lora:
        return
    from llm_trainer.model.adapters.lora import adapters_in_use, merge_lora, remove_adapters
    from llm_trainer.model.interop.peft_format import is_adapter_folder, load_adapter

    if adapter is None:
        chosen = adapters_in_use(model)
    elif adapter in model.config.lora or adapter == WITHOUT_ADAPTER:
        chosen = [name for name in model.config.lora if name == adapter]
    elif is_adapter_folder(adapter):
        chosen = ["folder"]
        load_adapter(model, adapter, "folder")
    else:
        known = ", ".join([*model.config.lora, WITHOUT_ADAPTER])
        raise UsageError(
            f"the model has no adapter {adapter!r}, and no folder of that name holds one; those that it has: {known}"
        )
    merge_lora(model, chosen, restart=False)
    for name in list(model.config.lora):
        remove_adapters(model, name)


def find_description(spec: str) -> ModelConfig:
    """The configuration of the model that `spec` means; of one on the hub no more than that is fetched.
    Raises as `find_model`.
    """
    source = find_model(spec, files=("config.json",))
    return load_transformer(source).config if source.suffix in PICKLES else read_config(source)


def find_model(spec: str, *, files: Sequence[str] = MODEL_FILES) -> Path:
    """The folder (or nanoGPT's file) that `spec` means; a name that is not here is looked for on the hub, for
    these files.
    """
    path = Path(spec)
    hub_name = SHORT_NAMES.get(spec, spec)
    looks_like_hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+", hub_name) is not None and path.suffix not in (
        *PICKLES,
        ".safetensors",
    )
    if not path.exists() and looks_like_hub and not path.parent.is_dir():
        return fetch_from_hub(hub_name, files)
    if not path.exists() and spec in SHORT_NAMES:
        return fetch_from_hub(hub_name, files)
    return resolve_model_folder(spec)


def load_tokenizer(source: Path) -> Tokenizer:
    """The tokenizer that lies with a model.

    For nanoGPT's file: `meta.pkl` or tokenizer.json beside it, else in `data/<the dataset it names>`, else
    GPT-2's, as its sample.py does.
    """
    if source.is_dir():
        return Tokenizer.load(source)
    from llm_trainer.model.interop.nanogpt_import import dataset_of

    places = [source.parent]
    if dataset := dataset_of(source):
        places.append(DATA_FOLDER / dataset)
    holding = [
        place for place in places if any((place / name).is_file() for name in (META_FILE, TOKENIZER_FILE))
    ]
    tokenizer, _, notes = read_vocabulary(holding[0] if holding else source.parent)
    if tokenizer is None:
        raise DataError(f"{source}: {'; '.join(notes)}; put tokenizer.json or meta.pkl beside it")
    return tokenizer


def resolve_device(device: str) -> str:
    """`auto` → cuda, mps or cpu, whichever is there; raises UsageError for one that is not."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not index.isdigit()):
        raise UsageError(f"device {device!r} is unknown; give auto, cpu, cuda, cuda:N or mps")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[kind]
    if not there or (kind == "cuda" and index and int(index) >= torch.cuda.device_count()):
        raise UsageError(f"device {device!r} is not on this machine; give device=auto or cpu")
    return device


def resolve_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type of the weights that `precision` means on this device."""
    if precision != "auto":
        if precision not in DTYPES:
            raise UsageError(f"precision {precision!r} is unknown; give auto, fp32, bf16 or fp16")
        return DTYPES[precision]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _end_ids(source: Path, tokenizer: Tokenizer) -> Iterable[int] | None:
    """Tokens that end a text: the tokenizer's, and those that a model of the hub names (chat models have
    several).
    """
    ids = set() if tokenizer.eos_id is None else {tokenizer.eos_id}
    for name in ("generation_config.json", "config.json"):
        file = source / name
        if not source.is_dir() or not file.is_file():
            continue
        try:
            named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{file} is not a JSON object: {error}") from error
        ids.update(one for one in (named if isinstance(named, list) else [named]) if isinstance(one, int))
    return ids
