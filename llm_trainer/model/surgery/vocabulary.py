"""Another vocabulary: rows of the embedding and of the head kept by id, or moved as a file says; new rows at
the mean of the old.

The mean of all rows is a token that means nothing in particular (Hewitt 2021, "Initializing new word
embeddings"): the logits of the old ids are kept exactly; their probabilities share with the newcomers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.errors import UsageError
from llm_trainer.model.surgery.model_state import Form
from llm_trainer.model.surgery.width_map import MEAN, sew


def read_remapping(path: Path | str) -> dict[int, int]:
    """Old id → new id, from a JSON object such as {"0": 0, "17": 5}. Raises UsageError for a missing file or
    another content.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"there is no vocabulary remapping file {path}; write the JSON object of old id → new id, or correct remap_file"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"the vocabulary remapping file {path} cannot be read: {error}") from None
    if not isinstance(content, dict) or not all(
        key.isdecimal() and type(value) is int and value >= 0 for key, value in content.items()
    ):
        raise UsageError(
            f'{path} is not a vocabulary remapping: a JSON object of old id → new id, such as {{"0": 0, "17": 5}}'
        )
    if len(set(content.values())) != len(content):
        raise UsageError(f"{path} sends two old ids to one new id; each new id has one source")
    return {int(old): new for old, new in content.items()}


def resized_config(config: ModelConfig, size: int, remapping: Mapping[int, int] | None = None) -> ModelConfig:
    """The shape after `resize_vocabulary`. Raises UsageError for a remapping of ids that are not there."""
    for old, new in (remapping or {}).items():
        if old >= config.vocab_size or new >= size:
            raise UsageError(
                f"the remapping sends id {old} of {config.vocab_size} to {new} of {size}, which is past the end"
            )
    return config.model_copy(update={"vocab_size": size})


def resize_vocabulary(form: Form, size: int, remapping: Mapping[int, int] | None = None) -> Form:
    """A vocabulary of `size` ids; `remapping` old → new moves those that it names and drops the others.
    Raises UsageError.
    """
    config = resized_config(form.config, size, remapping)
    index = torch.full((size,), MEAN)
    if remapping is None:
        kept = min(size, form.config.vocab_size)
        index[:kept] = torch.arange(kept)
    else:
        for old, new in remapping.items():
            index[new] = old
    return sew(form, config, {(None, "vocabulary"): index})
