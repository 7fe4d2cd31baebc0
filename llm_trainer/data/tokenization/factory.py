"""Which tokenizer the settings ask for: one that exists, or one to be trained and on how much text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import JsonValue

from llm_trainer.config.schema.data import DataConfig
from llm_trainer.data.progress import ByteProgress
from llm_trainer.data.tokenization.tiktoken_import import ENCODINGS
from llm_trainer.data.tokenization.tokenizer import Kind, Tokenizer
from llm_trainer.errors import DataError, UsageError

DEFAULT_ENCODING = "gpt2"


def given_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The existing tokenizer that `tokenizer_path` or `tokenizer_type tiktoken` names, with `special_tokens`;
    None where one is trained.

    Raises UsageError where the two settings contradict each other, DataError where the tokenizer cannot be
    had.
    """
    found = _named(config)
    return None if found is None else found.with_special_tokens(config.special_tokens)


def train_tokenizer(config: DataConfig, texts: Iterable[str], progress: ByteProgress) -> Tokenizer:
    """A tokenizer of the kind that the settings ask for, learned from `texts`, which are read once."""

    def counted() -> Iterator[str]:
        for text in texts:
            yield text
            progress.advance(len(text))

    return Tokenizer.train(kind_to_train(config), counted(), config.vocab_size, config.special_tokens)


def kind_to_train(config: DataConfig) -> Kind:
    """bpe, wordpiece or char; auto is bpe."""
    if config.tokenizer_type == "char" or config.tokenizer_type == "wordpiece":
        return config.tokenizer_type
    return "bpe"


def tokenizer_options(config: DataConfig, given: Tokenizer | None) -> dict[str, JsonValue]:
    """What decides the tokenizer, for a key: a given one's hash, or the settings of the training."""
    if given is not None:
        return {"tokenizer": given.hash}
    kind, special_tokens = kind_to_train(config), list[JsonValue](config.special_tokens)
    if kind == "char":
        return {"tokenizer_type": kind, "special_tokens": special_tokens}
    return {
        "tokenizer_type": kind,
        "vocab_size": config.vocab_size,
        "tokenizer_sample_megabytes": config.tokenizer_sample_megabytes,
        "special_tokens": special_tokens,
    }


def _named(config: DataConfig) -> Tokenizer | None:
    kind, path = config.tokenizer_type, config.tokenizer_path
    if kind == "tiktoken":
        return _encoding(path or DEFAULT_ENCODING)
    if path is None:
        return None
    found = Tokenizer.load(path)
    if kind not in ("auto", found.kind):
        raise UsageError(
            f"tokenizer_type is {kind}, but {path} is of the kind {found.kind}; leave one of the two out"
        )
    return found


def _encoding(name: str) -> Tokenizer:
    """tiktoken's encoding by its name, or from a file of ranks."""
    if name in ENCODINGS and not Path(name).exists():
        return Tokenizer.tiktoken(name)
    if not Path(name).is_file():
        known = ", ".join(ENCODINGS)
        raise DataError(
            f"tokenizer_path={name}: there is no such file of ranks, and tiktoken's encodings are {known}; give one of these"
        )
    if name.endswith(".json"):
        raise UsageError(
            f"tokenizer_type is tiktoken, but {name} is no file of ranks; leave tokenizer_type out to use it"
        )
    return Tokenizer.load(name)
