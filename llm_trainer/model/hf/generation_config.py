"""What a model folder says about generation: generation_config.json and the token ids in config.json.

Chat models end their turns with other tokens than their texts, so both files may list several ids. Training
does not change them: they are carried from the base model to everything that is saved.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from llm_trainer.errors import CheckpointError

GENERATION_FILE = "generation_config.json"
MAX_BYTES = 10_000_000

TokenIds: TypeAlias = "int | list[int] | None"


@dataclass(frozen=True)
class GenerationDefaults:
    """What a model folder says about generation.

    Attributes:
        text: The text of generation_config.json; None where there is none.
        token_ids: `bos_token_id`, `eos_token_id` and `pad_token_id` of config.json, each an id or a list.
        end_ids: The ids that end a text, by either file.
    """

    text: str | None = None
    token_ids: Mapping[str, TokenIds] = field(default_factory=dict)
    end_ids: frozenset[int] = frozenset()

    @classmethod
    def read(cls, folder: Path) -> GenerationDefaults:
        """Read them from a model folder; files that are not there say nothing.

        Raises:
            CheckpointError: A file is not a JSON object, or its token ids are not ids.
        """
        text = _read_text(folder / GENERATION_FILE)
        generation = _object(text, folder / GENERATION_FILE)
        config = _object(_read_text(folder / "config.json"), folder / "config.json")
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        token_ids = {name: _token_ids(config, name, folder / "config.json") for name in names}
        named = _token_ids(generation, "eos_token_id", folder / GENERATION_FILE)
        return cls(text, token_ids, frozenset([*_as_list(named), *_as_list(token_ids["eos_token_id"])]))

    def merged_ids(self, bos_id: int | None, eos_id: int | None, pad_id: int | None) -> dict[str, TokenIds]:
        """The token ids of the config.json of a model with this tokenizer.

        The ids that the base model names for the end of a text are kept, and the tokenizer's is among them.

        Args:
            bos_id: The tokenizer's id that begins a text.
            eos_id: The tokenizer's id that ends a text.
            pad_id: The tokenizer's id of padding.
        """
        ends = _as_list(self.token_ids.get("eos_token_id"))
        ends += [eos_id] if eos_id is not None and eos_id not in ends else []
        return {
            "bos_token_id": self.token_ids.get("bos_token_id") if bos_id is None else bos_id,
            "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
            "pad_token_id": self.token_ids.get("pad_token_id") if pad_id is None else pad_id,
        }


def _as_list(ids: TokenIds) -> list[int]:
    if ids is None:
        return []
    return list(ids) if isinstance(ids, list) else [ids]


def _token_ids(content: Mapping[str, Any], name: str, file: Path) -> TokenIds:
    value = content.get(name)
    each = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(one, bool) or not isinstance(one, int) for one in each):
        raise CheckpointError(f"{name} in {file} is {str(value)[:200]}; it must be an id or a list of ids")
    known = [one for one in each if 0 <= one < 2**31]  # -1 is how some folders write "none"
    return known if isinstance(value, list) else next(iter(known), None)


def _read_text(file: Path) -> str | None:
    if not file.is_file():
        return None
    try:
        if file.stat().st_size > MAX_BYTES:
            raise CheckpointError(
                f"{file} has more than {MAX_BYTES // 10**6} MB, so it is not a configuration"
            )
        return file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def _object(text: str | None, file: Path) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a JSON object: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is not a JSON object: it holds a {type(found).__name__}")
    return found
