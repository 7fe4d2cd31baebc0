"""Chat templates of a tokenizer: carried from folder to folder as text.

A chat template is a program in the language jinja that someone else wrote. It is copied so that transformers
and servers find it in what is saved here, and never executed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from llm_trainer.errors import DataError

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
PATTERNS = (TEMPLATE_FILE, f"{TEMPLATE_FOLDER}/*.jinja")
MAX_BYTES = 10_000_000
_MAX_FILES = 100


def read_chat_templates(folder: Path) -> dict[str, str]:
    """Read the chat templates of a folder.

    Args:
        folder: A folder of a tokenizer or model.

    Returns:
        File name within the folder → text.

    Raises:
        DataError: A template is not UTF-8, or larger than a template can be.
    """
    files = [file for pattern in PATTERNS for file in sorted(folder.glob(pattern)) if file.is_file()]
    if len(files) > _MAX_FILES:
        raise DataError(
            f"{folder} has {len(files)} chat templates; at most {_MAX_FILES} are carried, remove some"
        )
    return {file.relative_to(folder).as_posix(): _read(file) for file in files}


def find_chat_templates(folder: Path) -> dict[str, str]:
    """The chat templates of a folder, also one that is kept in its tokenizer_config.json.

    Args:
        folder: A folder of a tokenizer or model.

    Returns:
        File name → text, as `write_chat_templates` takes them.

    Raises:
        DataError: A template cannot be read.
    """
    templates = read_chat_templates(folder)
    config = folder / "tokenizer_config.json"
    if TEMPLATE_FILE in templates or not config.is_file():
        return templates
    try:
        kept = json.loads(_read(config)).get("chat_template")
    except (ValueError, RecursionError, AttributeError):
        return templates
    return {TEMPLATE_FILE: kept, **templates} if isinstance(kept, str) else templates


def write_chat_templates(folder: Path, templates: Mapping[str, str]) -> None:
    """Write chat templates into a folder.

    Args:
        folder: An existing folder.
        templates: As `read_chat_templates` returns them.
    """
    for name, text in templates.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text.encode("utf-8"))


def _read(file: Path) -> str:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise DataError(
                f"{file} has more than {MAX_BYTES // 10**6} MB, which no chat template needs; remove it"
            )
        return file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as a chat template: {error}; restore or remove it") from None
