"""Converts tiktoken's encodings to tokenizers of the `tokenizers` library.

An encoding is loaded by name through tiktoken's own loader, or from a local vocabulary file. Such a file
(`cl100k_base.tiktoken`: lines of base64 and a rank) contains neither the pattern that splits words nor the
special tokens. Those of OpenAI's four vocabularies are in the table below, which a test compares with
tiktoken's own, and a file is recognised by its number of ranks. Any other file (Llama 3's `tokenizer.model`
has this format, too) is assumed to split words as Llama 3 and GPT-4 do.

After a conversion both libraries encode a text of hard cases; different ids are an error, not a warning.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from llm_trainer.data.tokenization.fast.pretokenizer import GPT2_PATTERN, LLAMA3_PATTERN, O200K_PATTERN
from llm_trainer.data.tokenization.tokenizer_json import (
    END_OF_TEXT,
    byte_level_pre_tokenizer,
    bytes_to_unicode,
)
from llm_trainer.errors import DataError, UsageError

_FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
_END_OF_PROMPT = "<|endofprompt|>"
_URL = "https://openaipublic.blob.core.windows.net/encodings"
_HARD_CASES = (
    "Don't we'LL they'Ve I'M it'S 'tis\r\n\r\n  indented\n\tand\ttabs  \n \n\n12345678 3.14159 x=-1;"
    " café naïve ÉCOLE Größe Straße — “quoted”… 日本語テキスト 한국어 Привет мир שלום مرحبا"
    " हिन्दी ไทย 🙂👍🏽 e\u0301 \u00a0\u3000 https://a.b/c?d=e&f=g#h /path/to//file camelCase HTTPServer"
    " ALLCAPS'S <|endoftext|> ((([[[{{{!!!???...---___###\n\n\n   \n    four spaces    "
)


@dataclass(frozen=True)
class Encoding:
    """An encoding of tiktoken.

    Attributes:
        pattern: The regular expression that splits words.
        special_tokens: Special token → id.
        num_ranks: Number of ordinary tokens.
    """

    pattern: str
    special_tokens: Mapping[str, int]
    num_ranks: int


_GPT2 = Encoding(GPT2_PATTERN, {END_OF_TEXT: 50256}, 50256)
ENCODINGS: Mapping[str, Encoding] = {
    "gpt2": _GPT2,
    "r50k_base": _GPT2,
    "p50k_base": Encoding(GPT2_PATTERN, {END_OF_TEXT: 50256}, 50280),
    "p50k_edit": Encoding(
        GPT2_PATTERN, {END_OF_TEXT: 50256, **{token: 50281 + i for i, token in enumerate(_FIM)}}, 50280
    ),
    "cl100k_base": Encoding(
        LLAMA3_PATTERN,
        {END_OF_TEXT: 100257, **{token: 100258 + i for i, token in enumerate(_FIM)}, _END_OF_PROMPT: 100276},
        100256,
    ),
    "o200k_base": Encoding(O200K_PATTERN, {END_OF_TEXT: 199999, _END_OF_PROMPT: 200018}, 199998),
}


def load_encoding(name: str) -> Backend:
    """Load an encoding by its name; tiktoken downloads it or has it in its cache.

    Raises:
        DataError: The download failed.
        UsageError: The name is not in `ENCODINGS`.
    """
    import requests
    import tiktoken

    if name not in ENCODINGS:
        raise UsageError(
            f"{name!r} is not a tiktoken encoding; choose one of {', '.join(ENCODINGS)},"
            " or give a local vocabulary file"
        )
    try:
        ranks: dict[bytes, int] = tiktoken.get_encoding(name)._mergeable_ranks
    except (OSError, requests.RequestException, ValueError) as error:
        file = f"{'r50k_base' if name == 'gpt2' else name.replace('_edit', '_base')}.tiktoken"
        raise DataError(
            f"tiktoken could not download its encoding {name} ({type(error).__name__}). Download"
            f" {_URL}/{file} on a machine with a network, and use it with --tokenizer_path {file}"
            f" (data/*/prepare.py: --ranks {file})"
        ) from None
    return bpe_from_ranks(ranks, ENCODINGS[name].pattern, ENCODINGS[name].special_tokens)


def load_encoding_file(file: Path, name: str | None = None) -> Backend:
    """Load a local vocabulary file: tiktoken's ranks, or GPT-2's `vocab.bpe`.

    Args:
        file: The file.
        name: The encoding; by default it is recognised by its number of ranks.

    Raises:
        DataError: The file is of another format, or damaged.
    """
    ranks = read_ranks(file)
    if name is None:
        is_gpt2 = file.name.endswith(".bpe")
        name = next(
            (known for known, encoding in ENCODINGS.items() if encoding.num_ranks == len(ranks)),
            "gpt2" if is_gpt2 else None,
        )
    if name is not None and ENCODINGS[name].num_ranks == len(ranks):
        return bpe_from_ranks(ranks, ENCODINGS[name].pattern, ENCODINGS[name].special_tokens)
    pattern = LLAMA3_PATTERN if name is None else ENCODINGS[name].pattern
    return bpe_from_ranks(ranks, pattern, {END_OF_TEXT: max(ranks.values()) + 1})


def bpe_from_ranks(ranks: Mapping[bytes, int], pattern: str, special_tokens: Mapping[str, int]) -> Backend:
    """Make a byte-level BPE tokenizer of tiktoken's ranks.

    Args:
        ranks: Bytes of each token → its id, which is also the order of merges.
        pattern: The regular expression that splits words.
        special_tokens: Special token → id.

    Raises:
        DataError: The ranks are not an order of merges, or tiktoken gives other ids than the result.
    """
    characters = bytes_to_unicode()
    names = {token: "".join(characters[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = merge_bytes(ranks, token, rank)
            if len(parts) != 2:
                raise DataError(
                    f"rank {rank} ({token!r}) cannot be merged from two smaller ranks;"
                    " the vocabulary file is damaged, download it again"
                )
            merges.append((names[parts[0]], names[parts[1]]))
    vocabulary = {names[token]: rank for token, rank in ranks.items()}
    backend = Backend(models.BPE({**vocabulary, **special_tokens}, merges))
    backend.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False)
        if pattern == GPT2_PATTERN
        else byte_level_pre_tokenizer(pattern)
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special_tokens]
    )
    _check_same_ids(backend, ranks, pattern)
    return backend


def _check_same_ids(backend: Backend, ranks: Mapping[bytes, int], pattern: str) -> None:
    import tiktoken

    theirs = tiktoken.Encoding("as-given", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens={})
    backend.encode_special_tokens = True
    if backend.encode(_HARD_CASES, add_special_tokens=False).ids != theirs.encode(
        _HARD_CASES, disallowed_special=()
    ):
        raise DataError(
            "this vocabulary cannot be converted: the tokenizers library and tiktoken encode a test text"
            " differently; use a tokenizer.json of the same tokenizer"
        )


def merge_bytes(ranks: Mapping[bytes, int], token: bytes, limit: int) -> list[bytes]:
    """Apply byte pair encoding to the bytes of a token, with the merges whose rank is below `limit` alone.

    Args:
        ranks: Bytes of each token → its rank.
        token: The bytes.
        limit: The first rank that is not used.

    Returns:
        The parts that are left when no merge applies.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        rank, index = min((ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1))
        if rank >= limit:
            break
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return parts


def read_ranks(file: Path) -> dict[bytes, int]:
    """Read a vocabulary file: tiktoken's lines `base64 rank`, or the merges of GPT-2's `vocab.bpe`.

    Returns:
        Bytes of each token → its rank.

    Raises:
        DataError: The file is missing, of another format, or damaged.
    """
    if not file.is_file():
        raise DataError(f"no vocabulary file at {file}; give a .tiktoken file or GPT-2's vocab.bpe")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        if lines and lines[0].startswith("#version"):
            return _ranks_of_merges(lines[1:])
        pairs = (line.split() for line in lines if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, KeyError, binascii.Error) as error:
        raise DataError(
            f"{file} is neither a tiktoken vocabulary (lines of base64 and a rank) nor a vocab.bpe: {error};"
            " give one of these"
        ) from None
    if len({*ranks.values()}) != len(ranks) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise DataError(
            f"{file} is damaged: ranks repeat or some of the 256 bytes are missing; download it again"
        )
    return ranks


def _ranks_of_merges(lines: Sequence[str]) -> dict[bytes, int]:
    characters = bytes_to_unicode()
    byte_of = {character: byte for byte, character in enumerate(characters)}
    # GPT-2 numbers the bytes by the code points of their characters.
    by_codepoint = sorted(range(256), key=lambda byte: ord(characters[byte]))
    ranks = {bytes([byte]): rank for rank, byte in enumerate(by_codepoint)}
    for line in lines:
        if line:
            left, right = line.split()
            ranks[bytes(byte_of[character] for character in left + right)] = len(ranks)
    return ranks
