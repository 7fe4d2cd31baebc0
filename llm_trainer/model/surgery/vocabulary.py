"""Another vocabulary: rows of the embedding and the head are kept by id or moved by a remapping file, and new
rows start at the mean.

The mean of all rows is a token that means nothing in particular (Hewitt 2021, "Initializing new word
embeddings"). The logits of the old ids are kept exactly; their probabilities make room for the new ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.errors import UsageError
from llm_trainer.model.surgery.model_state import ModelState
from llm_trainer.model.surgery.width_map import MEAN, remap


def read_remapping(path: Path | str) -> dict[int, int]:
    """Read a vocabulary remapping.

    Args:
        path: A JSON object of old id → new id, such as {"0": 0, "17": 5}.

    Returns:
        Old id → new id.

    Raises:
        UsageError: The file is missing or has another content.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"the vocabulary remapping file {path} does not exist; write the JSON object of old id → new id, "
            "or correct remap_file"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"the vocabulary remapping file {path} cannot be read: {error}") from None
    if not isinstance(content, dict) or not all(
        key.isdecimal() and type(value) is int and value >= 0 for key, value in content.items()
    ):
        raise UsageError(
            f"{path} is not a vocabulary remapping: it must be a JSON object of old id → new id, such as "
            '{"0": 0, "17": 5}'
        )
    if len(set(content.values())) != len(content):
        raise UsageError(f"{path} maps two old ids to one new id; give each new id one source")
    return {int(old): new for old, new in content.items()}


def resized_config(config: ModelConfig, size: int, remapping: Mapping[int, int] | None = None) -> ModelConfig:
    """The shape after `resize_vocabulary`.

    Raises:
        UsageError: The remapping names an id that does not exist.
    """
    for old, new in (remapping or {}).items():
        if old >= config.vocab_size or new >= size:
            raise UsageError(
                f"the remapping maps id {old} of {config.vocab_size} to {new} of {size}, which is out of "
                "range"
            )
    return config.model_copy(update={"vocab_size": size})


def resize_vocabulary(state: ModelState, size: int, remapping: Mapping[int, int] | None = None) -> ModelState:
    """Give the model another vocabulary.

    Args:
        state: The present model.
        size: The new number of ids.
        remapping: Old id → new id; ids that it does not name are dropped. None: every id keeps its number.

    Returns:
        The new model.

    Raises:
        UsageError: The remapping names an id that does not exist.
    """
    config = resized_config(state.config, size, remapping)
    index = torch.full((size,), MEAN)
    if remapping is None:
        kept = min(size, state.config.vocab_size)
        index[:kept] = torch.arange(kept)
    else:
        for old, new in remapping.items():
            index[new] = old
    return remap(state, config, {(None, "vocabulary"): index})
