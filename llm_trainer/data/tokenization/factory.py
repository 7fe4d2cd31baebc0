"""Chooses the tokenizer that the settings describe: an existing one, or one to be trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import JsonValue

from llm_trainer.config.schema.data import DataConfig
from llm_trainer.data.progress import ByteProgress
from llm_trainer.data.tokenization.tiktoken_import import ENCODINGS
from llm_trainer.data.tokenization.tokenizer import Tokenizer, TokenizerKind
from llm_trainer.errors import DataError, UsageError

DEFAULT_ENCODING = "gpt2"


def load_existing_tokenizer(config: DataConfig) -> Tokenizer | None:
    """Load the tokenizer that the settings name, and add `special_tokens` to it.

    Args:
        config: The data settings.

    Returns:
        The tokenizer; None if the settings ask for a new one to be trained.

    Raises:
        DataError: The tokenizer cannot be loaded.
        UsageError: The two settings contradict each other.
    """
    found = _load_named(config)
    return None if found is None else found.with_special_tokens(config.special_tokens)


def train_tokenizer(config: DataConfig, texts: Iterable[str], progress: ByteProgress) -> Tokenizer:
    """Train a tokenizer of the kind that the settings ask for.

    Args:
        config: The data settings.
        texts: The training text, read once.
        progress: Counts the characters that have been read.
    """

    def counted() -> Iterator[str]:
        for text in texts:
            yield text
            progress.advance(len(text))

    return Tokenizer.train(kind_to_train(config), counted(), config.vocab_size, config.special_tokens)


def kind_to_train(config: DataConfig) -> TokenizerKind:
    """The kind of a new tokenizer: bpe, wordpiece or char; auto is bpe."""
    if config.tokenizer_type == "char" or config.tokenizer_type == "wordpiece":
        return config.tokenizer_type
    return "bpe"


def tokenizer_options(config: DataConfig, existing: Tokenizer | None) -> dict[str, JsonValue]:
    """Everything that decides the tokenizer, for the key of a result.

    Args:
        config: The data settings.
        existing: The existing tokenizer; None if one is trained.
    """
    if existing is not None:
        return {"tokenizer": existing.hash}
    kind, special_tokens = kind_to_train(config), list[JsonValue](config.special_tokens)
    if kind == "char":
        return {"tokenizer_type": kind, "special_tokens": special_tokens}
    return {
        "tokenizer_type": kind,
        "vocab_size": config.vocab_size,
        "tokenizer_sample_megabytes": config.tokenizer_sample_megabytes,
        "special_tokens": special_tokens,
    }


def _load_named(config: DataConfig) -> Tokenizer | None:
    kind, path = config.tokenizer_type, config.tokenizer_path
    if kind == "tiktoken":
        return _load_tiktoken(path or DEFAULT_ENCODING)
    if path is None:
        return None
    found = Tokenizer.load(path)
    if kind not in ("auto", found.kind):
        raise UsageError(
            f"tokenizer_type is {kind}, but the tokenizer {path} is of type {found.kind};"
            " remove one of the two settings"
        )
    return found


def _load_tiktoken(name: str) -> Tokenizer:
    """Load a tiktoken encoding by its name, or from a vocabulary file."""
    if name in ENCODINGS and not Path(name).exists():
        return Tokenizer.tiktoken(name)
    if not Path(name).is_file():
        known = ", ".join(ENCODINGS)
        raise DataError(
            f"tokenizer_path={name} is neither a tiktoken vocabulary file nor a tiktoken encoding;"
            f" give a file, or one of {known}"
        )
    if name.endswith(".json"):
        raise UsageError(
            f"tokenizer_type is tiktoken, but {name} is not a tiktoken vocabulary file;"
            " remove tokenizer_type to use it"
        )
    return Tokenizer.load(name)
