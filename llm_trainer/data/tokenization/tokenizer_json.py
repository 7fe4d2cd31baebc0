"""Building blocks of tokenizers: bytes as characters, character tokenizers, tokenizer.json files."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from llm_trainer.errors import DataError

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "[UNK]"


def bytes_to_unicode() -> list[str]:
    """GPT-2's printable character for each byte, as a list that is indexed by the byte.

    Printable Latin-1 characters represent themselves, the other bytes are characters from U+0100 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def character_tokenizer(characters: Sequence[str]) -> Backend:
    """Make a tokenizer whose id i is `characters[i]`.

    Raises:
        DataError: There are no characters, or entries that are repeated or longer than one character.
    """
    if not characters:
        raise DataError(
            "there is no text to make a character tokenizer from; check that the input contains text"
        )
    if len(set(characters)) != len(characters) or any(len(character) != 1 for character in characters):
        raise DataError(
            "a character tokenizer needs distinct single characters;"
            " this vocabulary has repeated or longer entries"
        )
    backend = Backend(
        models.WordLevel({character: index for index, character in enumerate(characters)}, unk_token="")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return backend


def token_bytes_converter(is_byte_level: bool, decoder: str) -> Callable[[str], bytes]:
    """Make the function that converts a vocabulary entry to bytes.

    Args:
        is_byte_level: The vocabulary is written in GPT-2's characters for bytes.
        decoder: The decoder of the tokenizer.json, as JSON text.
    """
    if is_byte_level:
        byte_of = {character: byte for byte, character in enumerate(bytes_to_unicode())}
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


def prefix_ids(backend: Backend) -> tuple[int, ...]:
    """The ids that the post-processor of a tokenizer.json puts in front of every text.

    `add_bos_token` of tokenizer_config.json has no effect next to a tokenizer.json, as in transformers 5:
    the post-processor is the record of it.

    Args:
        backend: The tokenizer.
    """
    if backend.post_processor is None or not backend.num_special_tokens_to_add(is_pair=False):
        return ()
    encoding = backend.encode("a", add_special_tokens=True)
    leading = itertools.takewhile(
        lambda item: item[1], zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    )
    found = tuple(token for token, _ in leading)
    return found if len(found) < len(encoding.ids) else ()


def read_tokenizer_json(file: Path) -> Backend:
    """Open a tokenizer.json.

    Raises:
        DataError: The file is damaged.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as a tokenizer: {error}; give a tokenizer.json") from None
    try:
        return Backend.from_str(text)
    except Exception as error:  # the library raises bare Exception
        if type(error) is not Exception:
            raise
        raise DataError(
            f"{file} is not a tokenizer.json that the tokenizers library can read: {error};"
            " give the file that was saved with the tokenizer"
        ) from None


def download_from_hub(name: str, files: Sequence[str]) -> Path:
    """Download files of a Hugging Face hub repository, or find them in the hub's cache.

    Args:
        name: The repository.
        files: Names of the files, some of which may not exist.

    Returns:
        The folder of the files.

    Raises:
        DataError: The download failed.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]  # HTTPError is its client's, whose name changed

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (OSError, HFValidationError, HTTPError) as error:
        raise DataError(
            f"the tokenizer {name!r} is not a local file or folder, and it could not be downloaded from the"
            f" Hugging Face hub ({type(error).__name__}); give a folder with its tokenizer.json instead"
        ) from None


def byte_level_pre_tokenizer(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Split text into words by a pattern, and write each word in GPT-2's characters for its bytes."""
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
