"""`load_model`: from the name of a model to one that completes text.

`device="auto"` is the accelerator where there is one, else the CPU. `precision="auto"` is fp32 on a CPU,
where results are then those of training's validation, and bf16 (fp16 on older cards) on a GPU, which is made
for it. On a CPU bf16 takes half the memory and, with AMX or AVX512-BF16, less time (docs/how-to/generate.md).
But it rounds, and so it has to be asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.data.nanogpt_format import META_FILE, read_vocabulary
from llm_trainer.data.tokenization.tokenizer import TOKENIZER_FILE, Tokenizer
from llm_trainer.device import resolve_device
from llm_trainer.errors import CheckpointError, DataError, UsageError
from llm_trainer.inference.engine import LanguageModel
from llm_trainer.model.adapters.lora import active_adapters, merge_lora, remove_adapters
from llm_trainer.model.hf.checkpoint import (
    MODEL_FILES,
    SHORT_NAMES,
    download_from_hub,
    load_pretrained,
    read_config,
)
from llm_trainer.model.hf.generation_config import GenerationDefaults
from llm_trainer.model.interop.nanogpt_import import dataset_of, load_nanogpt
from llm_trainer.model.interop.peft_format import is_adapter_folder, load_adapter
from llm_trainer.model.transformer import Transformer
from llm_trainer.run_dir import resolve_model_folder

__all__ = [
    "LanguageModel",
    "load_model",
    "load_tokenizer",
    "load_transformer",
    "read_model_config",
    "resolve_dtype",
    "resolve_model",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PICKLES = (".pt", ".pth", ".ckpt")
WITHOUT_ADAPTER = "base"
DATA_DIR = Path("data")  # nanoGPT's, in the current directory


def load_model(
    path: str | Path,
    device: str = "auto",
    precision: str = "auto",
    compile: str = "auto",
    adapter: str | None = None,
) -> tuple[LanguageModel, Tokenizer]:
    """Load a model and its tokenizer.

    Low-rank adapters are merged into the matrices, so that generation costs what it costs for the plain
    model.

    Args:
        path: A run folder, a checkpoint by any of its names, nanoGPT's `ckpt.pt`, or a name on the hub.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        precision: Type of the weights: `auto`, `fp32`, `bf16` or `fp16`.
        compile: `auto`, `on` or `off`; see `LanguageModel`.
        adapter: The set of low-rank adapters to use: its name in the model, or a folder of PEFT's format.
            None: the sets that are active in the model; `base`: none.

    Returns:
        The model and the tokenizer.

    Raises:
        CheckpointError: There is no complete model.
        DataError: Its tokenizer is missing.
        UsageError: The device, precision or adapter is not available.
    """
    torch_device = resolve_device(device)
    dtype = resolve_dtype(precision, torch_device)
    source = resolve_model(str(path))
    tokenizer = load_tokenizer(source)
    model = load_transformer(source, torch_device, dtype)
    _merge_adapters(model, adapter)
    return LanguageModel(model, tokenizer, end_ids=_end_ids(source, tokenizer), compile=compile), tokenizer


def load_transformer(
    source: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer:
    """Load the network of a model.

    Args:
        source: A folder or nanoGPT's file, as `resolve_model` returns it.
        device: Where the weights go.
        dtype: Their type.

    Returns:
        The network, in evaluation mode.

    Raises:
        CheckpointError: The source is damaged or is no model.
    """
    if source.suffix in PICKLES:
        return load_nanogpt(source).to(device=device, dtype=dtype).eval()
    return load_pretrained(source, device, dtype)


def _merge_adapters(model: Transformer, adapter: str | None) -> None:
    """Make a plain model of one with adapters, which computes what the chosen ones do.

    Raises UsageError for an adapter that the model does not have.
    """
    if adapter is None and not model.config.lora:
        return
    if adapter is None:
        chosen = active_adapters(model)
    elif adapter in model.config.lora or adapter == WITHOUT_ADAPTER:
        chosen = [name for name in model.config.lora if name == adapter]
    elif is_adapter_folder(adapter):
        chosen = ["folder"]
        load_adapter(model, adapter, "folder")
    else:
        known = ", ".join([*model.config.lora, WITHOUT_ADAPTER])
        raise UsageError(
            f"the model has no adapter {adapter!r}, and no folder of that name has one; its adapters are: "
            f"{known}"
        )
    merge_lora(model, chosen, restart=False)
    for name in list(model.config.lora):
        remove_adapters(model, name)


def read_model_config(spec: str) -> ModelConfig:
    """The configuration of a model; of a model on the hub, only config.json is downloaded.

    Args:
        spec: As for `resolve_model`.

    Returns:
        The model's shape.

    Raises:
        CheckpointError: There is no such model, or its configuration cannot be read.
    """
    source = resolve_model(spec, files=("config.json",))
    return load_transformer(source).config if source.suffix in PICKLES else read_config(source)


def resolve_model(spec: str, *, files: Sequence[str] = MODEL_FILES) -> Path:
    """Find the model that a user means.

    Args:
        spec: A model folder, a run folder, a checkpoint by any of its names, nanoGPT's file, or a name on the
            hub.
        files: What to download of a model on the hub.

    Returns:
        The model's folder, or nanoGPT's file.

    Raises:
        CheckpointError: There is no such model.
    """
    path = Path(spec)
    hub_name = SHORT_NAMES.get(spec, spec)
    looks_like_hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+", hub_name) is not None and path.suffix not in (
        *PICKLES,
        ".safetensors",
    )
    if not path.exists() and looks_like_hub and not path.parent.is_dir():
        return download_from_hub(hub_name, files)
    if not path.exists() and spec in SHORT_NAMES:
        return download_from_hub(hub_name, files)
    try:
        return resolve_model_folder(spec)
    except CheckpointError as error:
        if path.exists() or len(path.parts) > 1 or path.suffix:
            raise
        names = ", ".join(SHORT_NAMES)
        raise CheckpointError(f"{error}; models on the hub are named OWNER/NAME, or {names}") from None


def load_tokenizer(source: Path) -> Tokenizer:
    """Load the tokenizer of a model.

    For nanoGPT's file it is the `meta.pkl` or tokenizer.json in the same folder, else the one in
    `data/<the dataset that it names>`, else GPT-2's, as in nanoGPT's sample.py.

    Args:
        source: A folder or nanoGPT's file, as `resolve_model` returns it.

    Returns:
        The tokenizer.

    Raises:
        DataError: There is none, or it cannot be read.
    """
    if source.is_dir():
        return Tokenizer.load(source)
    tokenizer, _, notes = read_vocabulary(find_nanogpt_vocabulary(source) or source.parent)
    if tokenizer is None:
        raise DataError(f"{source}: {'; '.join(notes)}; put tokenizer.json or meta.pkl into its folder")
    return tokenizer


def find_nanogpt_vocabulary(file: Path) -> Path | None:
    """The folder of the `meta.pkl` or tokenizer.json that belongs to nanoGPT's file.

    Args:
        file: nanoGPT's file.

    Returns:
        Its own folder, or `data/<the dataset that it names>`; None where neither has one.
    """
    folders = [file.parent]
    if dataset := dataset_of(file):
        folders.append(DATA_DIR / dataset)
    has_vocabulary = (
        folder for folder in folders if any((folder / name).is_file() for name in (META_FILE, TOKENIZER_FILE))
    )
    return next(has_vocabulary, None)


def resolve_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type of the weights.

    Args:
        precision: `auto`, `fp32`, `bf16` or `fp16`.
        device: Where the model runs, for `auto`.

    Returns:
        The torch type.

    Raises:
        UsageError: The precision is something else.
    """
    if precision != "auto":
        if precision not in DTYPES:
            raise UsageError(f"invalid value for precision: {precision!r}; choose auto, fp32, bf16 or fp16")
        return DTYPES[precision]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _end_ids(source: Path, tokenizer: Tokenizer) -> Iterable[int] | None:
    """Tokens that end a text: the tokenizer's, and those that a model of the hub names (chat models have
    several).
    """
    ids = set() if tokenizer.eos_id is None else {tokenizer.eos_id}
    return ids | GenerationDefaults.read(source).end_ids if source.is_dir() else ids
