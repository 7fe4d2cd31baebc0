"""nanoGPT's ckpt.pt, read without running what it may hold.

The file is a pickle. PyTorch's `weights_only` reader builds tensors, numbers, texts and plain containers and
refuses anything else, so a file with code in it is an error and the code does not run. Optimizer state is
left alone: its order of parameters is not ours.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.errors import CheckpointError
from llm_trainer.model.hf.checkpoint import empty_model
from llm_trainer.model.hf.weight_map import Entry, entries
from llm_trainer.model.module_names import plain_name
from llm_trainer.model.transformer import Transformer

_SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


def load_nanogpt(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """The model in a nanoGPT checkpoint, in evaluation mode; dtype none: fp32.

    Raises CheckpointError where the file is missing, damaged, holds more than data, or is not nanoGPT's.
    """
    content = _unpickle_data(Path(path))
    arguments, weights = content.get("model_args"), content.get("model")
    if not isinstance(arguments, Mapping) or not isinstance(weights, Mapping):
        raise CheckpointError(f"{path} is not a nanoGPT checkpoint: it has no 'model_args' and 'model'")
    missing = [name for name in _SIZES if not isinstance(arguments.get(name), int)]
    if missing:
        raise CheckpointError(f"{path} does not say its {', '.join(missing)} in 'model_args'")
    model = empty_model(_config_of(arguments), device, dtype or torch.float32)
    _fill(model, {plain_name(str(name)): tensor for name, tensor in weights.items()}, Path(path))
    return model.eval()


def dataset_of(path: str | Path) -> str | None:
    """The name of the folder in `data/` that the checkpoint was trained on, where it says so: its vocabulary
    is there.
    """
    config = _unpickle_data(Path(path)).get("config")
    name = config.get("dataset") if isinstance(config, Mapping) else None
    return name if isinstance(name, str) and name and Path(name).name == name else None


def _unpickle_data(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was not opened: it is damaged, or it holds more than tensors and plain values, which could run code "
            f"({str(error).strip().splitlines()[0]})"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a PyTorch file: {str(error).strip().splitlines()[0]}"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} is not a nanoGPT checkpoint: it holds a {type(content).__name__}")
    return content


def _config_of(arguments: Mapping[str, Any]) -> ModelConfig:
    """nanoGPT's model: GPT-2's shape with exact GELU, with or without biases."""
    dropout = float(arguments.get("dropout") or 0.0)
    sizes = {name: arguments[name] for name in _SIZES}
    return ModelConfig(
        model_type="gpt2", activation="gelu", bias=bool(arguments.get("bias", True)), dropout=dropout, **sizes
    )


@torch.no_grad()
def _fill(model: Transformer, weights: Mapping[str, Any], path: Path) -> None:
    """nanoGPT names its weights as GPT-2's files do, but keeps its matrices as nn.Linear has them."""
    parameters = dict(model.named_parameters())
    table = [Entry(entry.theirs, entry.ours) for entry in entries(parameters, "gpt2")]
    shape_of = {name: parameter.shape for name, parameter in parameters.items()}
    known = {entry.theirs for entry in table} | {"lm_head.weight"}
    unexpected = [name for name in weights if name not in known and not name.endswith(".attn.bias")]
    if unexpected:
        raise CheckpointError(
            f"{path} holds {', '.join(unexpected[:5])}, which a nanoGPT model does not have"
        )
    for entry in table:
        tensor = weights.get(entry.theirs)
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != entry.shape(shape_of):
            found = "nothing" if tensor is None else f"{tuple(getattr(tensor, 'shape', ()))}"
            raise CheckpointError(
                f"{path}: {entry.theirs} should have shape {entry.shape(shape_of)}, and has {found}"
            )
        for name, ours in entry.split(tensor).items():
            parameters[name].copy_(ours)
