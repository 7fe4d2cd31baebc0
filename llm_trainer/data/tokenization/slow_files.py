"""Builds tokenizers from the files that folders without a tokenizer.json hold.

`vocab.json` and `merges.txt` are a byte-level BPE. They contain neither the pattern that splits words nor the
normalizer, which belong to the tokenizer's class: GPT-2's and Qwen2's are known here, by the class that
tokenizer_config.json names or by the `model_type` of config.json. A `tokenizer.model` is SentencePiece's
binary format, or tiktoken's ranks, whose special tokens are in no file; both are refused with what to do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from llm_trainer.data.tokenization.tokenizer_json import END_OF_TEXT
from llm_trainer.errors import DataError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

VOCAB_FILE = "vocab.json"
MERGES_FILE = "merges.txt"
MODEL_FILE = "tokenizer.model"
ADDED_FILE = "added_tokens.json"
FILES = (VOCAB_FILE, MERGES_FILE, MODEL_FILE, ADDED_FILE)

_CLASS_OF_MODEL = {"gpt2": "GPT2", "qwen2": "Qwen2", "qwen3": "Qwen2"}
_CLASSES = {
    "GPT2Tokenizer": "GPT2",
    "GPT2TokenizerFast": "GPT2",
    "Qwen2Tokenizer": "Qwen2",
    "Qwen2TokenizerFast": "Qwen2",
}
# The roles that a class fills in where no file does.
_DEFAULT_ROLES: Mapping[str, tuple[str, ...]] = {
    "GPT2": ("eos_token", "bos_token", "unk_token"),
    "Qwen2": ("eos_token", "pad_token", "unk_token"),
}
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SAVE_IT = (
    "save a tokenizer.json where transformers is installed:"
    " AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
)


def has_tokenizer_files(folder: Path) -> bool:
    """Whether a folder without a tokenizer.json holds files of some tokenizer."""
    return any((folder / name).is_file() for name in (VOCAB_FILE, MERGES_FILE, MODEL_FILE))


def build_tokenizer(folder: Path, config: Mapping[str, Json]) -> tuple[Backend, dict[str, Json]]:
    """Build the tokenizer of a folder without a tokenizer.json.

    Args:
        folder: The folder.
        config: The contents of its tokenizer_config.json and special_tokens_map.json.

    Returns:
        The tokenizer, and the roles that its class gives to special tokens unless the files differ.

    Raises:
        DataError: Files are missing, damaged or of an unknown kind; the message says which.
    """
    vocab, merges = folder / VOCAB_FILE, folder / MERGES_FILE
    if not vocab.is_file() or not merges.is_file():
        raise DataError(_what_is_missing(folder))
    kind = _kind(folder, config)
    try:
        model = models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:  # the library raises bare Exception
        if type(error) is not Exception:
            raise
        raise DataError(
            f"{vocab} and {merges.name} are not a vocabulary that the tokenizers library can read: {error};"
            " restore both files"
        ) from None
    backend = Backend(model)
    prefix_space = config.get("add_prefix_space") is True
    backend.decoder = decoders.ByteLevel()
    if kind == "GPT2":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    else:
        backend.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(_QWEN2_PATTERN), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    defaults: dict[str, Json] = dict.fromkeys(_DEFAULT_ROLES[kind], END_OF_TEXT)
    _add_tokens(backend, folder, {**defaults, **config})
    _add_bos(backend, {**defaults, **config})
    return backend, defaults


def _what_is_missing(folder: Path) -> str:
    present = [name for name in (VOCAB_FILE, MERGES_FILE, MODEL_FILE) if (folder / name).is_file()]
    if MODEL_FILE in present:
        return f"{folder} has no tokenizer.json, only {MODEL_FILE}, which is not read here; {_SAVE_IT}"
    if present:
        absent = MERGES_FILE if VOCAB_FILE in present else VOCAB_FILE
        return (
            f"{folder} has no tokenizer.json, and of {VOCAB_FILE} and {MERGES_FILE} it lacks {absent};"
            f" add {absent} or a tokenizer.json"
        )
    return (
        f"{folder} has no tokenizer.json (and no {VOCAB_FILE} with {MERGES_FILE});"
        " prepare the data again, or give the folder of the tokenizer"
    )


def _kind(folder: Path, config: Mapping[str, Json]) -> str:
    """The class of the tokenizer; raises DataError for one whose pattern of words is not known."""
    named = config.get("tokenizer_class")
    model_type = _read_json(folder / "config.json").get("model_type")
    kind = _CLASSES.get(named) if isinstance(named, str) else _CLASS_OF_MODEL.get(str(model_type))
    if kind is None:
        what = f"tokenizer_class {named!r}" if named is not None else f"model_type {model_type!r}"
        raise DataError(
            f"{folder} has {VOCAB_FILE} and {MERGES_FILE} but no tokenizer.json, and how {what} splits words"
            f" is not known here; {_SAVE_IT}"
        )
    return kind


def _add_tokens(backend: Backend, folder: Path, config: Mapping[str, Json]) -> None:
    """Add the special tokens of all files, with the ids that the files give.

    Raises DataError where the library would give another id.
    """
    wanted: dict[int, AddedToken] = {}
    for name, number in _read_json(folder / ADDED_FILE).items():
        if isinstance(number, int):
            wanted[number] = AddedToken(name, special=True, normalized=False)
    table = config.get("added_tokens_decoder")
    for number, entry in (table if isinstance(table, dict) else {}).items():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and number.isdecimal():
            flags = {
                key: entry.get(key) is True
                for key in ("special", "normalized", "lstrip", "rstrip", "single_word")
            }
            wanted[int(number)] = AddedToken(str(entry["content"]), **flags)
    for number, token in sorted(wanted.items()):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != number:
            raise DataError(
                f"the added token {token.content!r} of {folder} has id {number} in its file, but"
                f" {VOCAB_FILE} leaves id {backend.token_to_id(token.content)} for it; {_SAVE_IT}"
            )
    for role in ("unk_token", "bos_token", "eos_token", "pad_token", "additional_special_tokens"):
        entry = config.get(role)
        for one in entry if isinstance(entry, list) else [entry]:
            named = one.get("content") if isinstance(one, dict) else one
            if isinstance(named, str) and named:
                backend.add_special_tokens([AddedToken(named, special=True, normalized=False)])


def _add_bos(backend: Backend, config: Mapping[str, Json]) -> None:
    """The post-processor of `add_bos_token`."""
    entry = config.get("bos_token")
    bos = entry.get("content") if isinstance(entry, dict) else entry
    if config.get("add_bos_token") is True and isinstance(bos, str):
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, backend.token_to_id(bos))]
        )


def _read_json(file: Path) -> dict[str, Json]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise DataError(f"{file} is not JSON ({error}); restore it") from None
    return found if isinstance(found, dict) else {}
