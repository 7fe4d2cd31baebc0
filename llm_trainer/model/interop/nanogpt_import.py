"""nanoGPT's ckpt.pt, read without running what it may contain.

The file is a pickle. PyTorch's `weights_only` reader builds tensors, numbers, strings and plain containers
and refuses anything else, so that a file with code in it is an error and the code does not run. The optimizer
state is not read, because its order of parameters is not ours.
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
from llm_trainer.model.hf.weight_map import TensorMapping, tensor_mappings
from llm_trainer.model.module_names import canonical_name
from llm_trainer.model.transformer import Transformer

_SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


def load_nanogpt(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """Load the model of a nanoGPT checkpoint, in evaluation mode.

    Args:
        path: The ckpt.pt.
        device: Where the weights go.
        dtype: Type of the weights. None: fp32.

    Returns:
        The model.

    Raises:
        CheckpointError: The file is missing, damaged, contains more than data, or is not nanoGPT's.
    """
    content = _unpickle_data(Path(path))
    arguments, weights = content.get("model_args"), content.get("model")
    if not isinstance(arguments, Mapping) or not isinstance(weights, Mapping):
        raise CheckpointError(f"{path} is not a nanoGPT checkpoint: it has no 'model_args' and 'model'")
    missing = [name for name in _SIZES if not isinstance(arguments.get(name), int)]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)} in 'model_args'")
    model = empty_model(_config_of(arguments), device, dtype or torch.float32)
    _fill(model, {canonical_name(str(name)): tensor for name, tensor in weights.items()}, Path(path))
    return model.eval()


def dataset_of(path: str | Path) -> str | None:
    """The name of the dataset that a checkpoint was trained on, or None where it does not record one.

    It is a folder in `data/`, which also has the vocabulary.
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
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{path} was not opened: it is damaged, or it contains more than tensors and plain values, "
            f"which could run code ({reason})"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path} cannot be read as a PyTorch file: {reason}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} is not a nanoGPT checkpoint: it contains a {type(content).__name__}")
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
    """Copy the weights, which have the names of GPT-2's files but matrices oriented as in nn.Linear."""
    parameters = dict(model.named_parameters())
    table = [TensorMapping(mapping.hf_name, mapping.names) for mapping in tensor_mappings(parameters, "gpt2")]
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    known = {mapping.hf_name for mapping in table} | {"lm_head.weight"}
    unexpected = [name for name in weights if name not in known and not name.endswith(".attn.bias")]
    if unexpected:
        raise CheckpointError(
            f"{path} contains {', '.join(unexpected[:5])}, which a nanoGPT model does not have"
        )
    for mapping in table:
        tensor, wanted = weights.get(mapping.hf_name), mapping.hf_shape(shapes)
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != wanted:
            found = "nothing" if tensor is None else f"{tuple(getattr(tensor, 'shape', ()))}"
            raise CheckpointError(
                f"{path}: {mapping.hf_name} should have the shape {wanted}, but the file has {found}"
            )
        for name, values in mapping.from_hf(tensor).items():
            parameters[name].copy_(values)
