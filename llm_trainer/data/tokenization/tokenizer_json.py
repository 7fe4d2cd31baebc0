"""What tokenizers are made of: bytes as characters, tables of characters, and files in the tokenizers
library's form.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from llm_trainer.errors import DataError

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "[UNK]"


def byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte: `byte_characters()[b]`. Printable Latin-1 stands for itself,
    the rest from U+0100 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def character_table(characters: Sequence[str]) -> Backend:
    """A tokenizer whose id i is `characters[i]`. Raises DataError for an empty table, repeated or longer
    entries.
    """
    if not characters:
        raise DataError(
            "there is no text to make a character tokenizer from; check that the input holds text"
        )
    if len(set(characters)) != len(characters) or any(len(character) != 1 for character in characters):
        raise DataError(
            "a character tokenizer needs different single characters; this table has repeated or longer entries"
        )
    backend = Backend(
        models.WordLevel({character: index for index, character in enumerate(characters)}, unk_token="")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return backend


def bytes_of_token(is_byte_level: bool, decoder: str) -> Callable[[str], bytes]:
    """How a vocabulary entry becomes bytes; `decoder` is the tokenizer.json's decoder as JSON text."""
    if is_byte_level:
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        return lambda token: (
            bytes(byte_of[character] for character in token)
            if set(token) <= byte_of.keys()
            else token.encode("utf-8")
        )
    has_byte_fallback, has_word_marks, has_word_pieces = (
        "ByteFallback" in decoder,
        "\\u2581" in decoder,
        "WordPiece" in decoder,
    )

    def to_bytes(token: str) -> bytes:
        if has_byte_fallback and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        if has_word_pieces:
            return (token[2:] if token.startswith("##") else " " + token).encode("utf-8")
        return (token.replace("\u2581", " ") if has_word_marks else token).encode("utf-8")

    return to_bytes


def read_tokenizer_json(file: Path) -> Backend:
    """Open one tokenizer.json; raises DataError naming the file where it is damaged."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as a tokenizer: {error}") from None
    try:
        return Backend.from_str(text)
    except Exception as error:  # the library raises bare Exception
        if type(error) is not Exception:
            raise
        raise DataError(
            f"{file} is not a tokenizer.json that the tokenizers library understands: {error}"
        ) from None


def download_from_hub(name: str, files: Sequence[str]) -> Path:
    """The folder with `files` of a hub repository, downloaded or from the hub's cache. Raises DataError where
    that fails.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]  # HTTPError is its client's, whose name changed

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (OSError, HFValidationError, HTTPError) as error:
        raise DataError(
            f"the tokenizer {name!r} is neither a local file or folder nor could it be fetched from the Hugging Face hub "
            f"({type(error).__name__}); give a folder with its tokenizer.json instead"
        ) from None


def byte_level_words(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Words cut by `pattern`, each then written in stand-ins of its bytes."""
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
