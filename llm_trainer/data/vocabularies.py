"""How the tokenizers themselves are made: trained byte-level BPE, tables of characters, GPT-2's vocabulary from its ranks.

Byte-level BPE (Sennrich 2016, arXiv:1508.07909; bytes as in GPT-2) has no unknown text. The text is cut into words first by the pattern of
Llama 3 and GPT-4, which other engines know by name, not by one of our own: exports then tokenise alike everywhere. A run without a
boundary (a line of base64, a genome) would become one word of any length, and training holds every word; so *training* cuts runs at
`LONGEST_RUN` characters, while the saved pattern stays the known one.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from llm_trainer.config.errors import DataError, UsageError

END_OF_TEXT = "<|endoftext|>"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERN = (
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SMALLEST_BPE = 257  # every byte, and the end of text
LONGEST_RUN = 256
_LONG_RUN = re.compile(rf"\S{{{LONGEST_RUN}}}|\s{{{LONGEST_RUN}}}")


def byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte: `byte_characters()[b]`. Printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int, *, show_progress: bool = False) -> Backend:
    """Learn merges from `texts` until there are `vocab_size` ids. Raises UsageError below 257 ids, DataError where there is no text."""
    if vocab_size < SMALLEST_BPE:
        raise UsageError(f"vocab_size {vocab_size} is too small for byte-level BPE: the bytes and the end of text need {SMALLEST_BPE} ids")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = _byte_level_words(PATTERN)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(END_OF_TEXT, special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    characters = 0

    def counted() -> Iterator[str]:
        nonlocal characters
        for text in texts:
            characters += len(text)
            yield from bounded_runs(text)

    backend.train_from_iterator(counted(), trainer)
    if not characters:
        raise DataError("there is no text to train a tokenizer on; check that the input holds text and that the training share is not 0")
    return backend


def bounded_runs(text: str) -> Iterator[str]:
    """`text` in pieces, cut inside every run of LONGEST_RUN characters without white space (or of nothing else)."""
    start = 0
    for match in _LONG_RUN.finditer(text):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


def character_table(characters: Sequence[str]) -> Backend:
    """A tokenizer whose id i is `characters[i]`. Raises DataError for an empty table, repeated or longer entries."""
    if not characters:
        raise DataError("there is no text to make a character tokenizer from; check that the input holds text")
    if len(set(characters)) != len(characters) or any(len(character) != 1 for character in characters):
        raise DataError("a character tokenizer needs different single characters; this table has repeated or longer entries")
    backend = Backend(models.WordLevel({character: index for index, character in enumerate(characters)}, unk_token=""))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return backend


def bpe_from_ranks(ranks: Mapping[bytes, int], pattern: str) -> Backend:
    """A byte-level BPE from tiktoken's form, bytes → rank: the rank is the id and the order of merging. `<|endoftext|>` comes after."""
    stand_in = byte_characters()
    names = {token: "".join(stand_in[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = merge_bytes(ranks, token, rank)
            if len(parts) != 2:
                raise DataError(f"rank {rank} ({token!r}) cannot be merged from two smaller ranks; the vocabulary file is damaged")
            merges.append((names[parts[0]], names[parts[1]]))
    backend = Backend(models.BPE({names[token]: rank for token, rank in ranks.items()}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if pattern == GPT2_PATTERN else _byte_level_words(pattern)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return backend


def merge_bytes(ranks: Mapping[bytes, int], token: bytes, limit: int) -> list[bytes]:
    """What byte pair encoding makes of `token` with merges of rank below `limit` alone."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        rank, place = min((ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1))
        if rank >= limit:
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def gpt2_byte_ranks(file: Path | None) -> dict[bytes, int]:
    """GPT-2's 50,256 byte ranks: from a `.tiktoken` file (gpt2, r50k_base), from GPT-2's `vocab.bpe`, or through tiktoken's download."""
    if file is not None:
        return read_ranks(file)
    import requests
    import tiktoken

    try:
        ranks: dict[bytes, int] = tiktoken.get_encoding("gpt2")._mergeable_ranks
    except (OSError, requests.RequestException) as error:
        raise DataError(
            f"GPT-2's vocabulary could not be downloaded ({type(error).__name__}). On a machine with a network fetch "
            "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken and give it with --ranks FILE "
            "(GPT-2's vocab.bpe does as well)"
        ) from None
    return ranks


def read_ranks(file: Path) -> dict[bytes, int]:
    """Read tiktoken's lines `base64 rank`, or the merges of GPT-2's `vocab.bpe`. Raises DataError for anything else."""
    if not file.is_file():
        raise DataError(f"no vocabulary file at {file}; give a .tiktoken file of ranks or GPT-2's vocab.bpe")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        if lines and lines[0].startswith("#version"):
            return _ranks_of_merges(lines[1:])
        pairs = (line.split() for line in lines if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, KeyError, binascii.Error) as error:
        raise DataError(f"{file} is neither tiktoken ranks (lines of base64 and a number) nor a vocab.bpe: {error}") from None
    if len({*ranks.values()}) != len(ranks) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise DataError(f"{file} is damaged: ranks repeat or some of the 256 bytes are missing; fetch it again")
    return ranks


def _ranks_of_merges(lines: Sequence[str]) -> dict[bytes, int]:
    stand_in = byte_characters()
    byte_of = {character: byte for byte, character in enumerate(stand_in)}
    by_codepoint = sorted(range(256), key=lambda byte: ord(stand_in[byte]))  # GPT-2 numbers the bytes in this order
    ranks = {bytes([byte]): rank for rank, byte in enumerate(by_codepoint)}
    for line in lines:
        if line:
            left, right = line.split()
            ranks[bytes(byte_of[character] for character in left + right)] = len(ranks)
    return ranks


def bytes_of_token(is_byte_level: bool, decoder: str) -> Callable[[str], bytes]:
    """How a vocabulary entry becomes bytes; `decoder` is the tokenizer.json's decoder as JSON text."""
    if is_byte_level:
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        return lambda token: bytes(byte_of[character] for character in token) if set(token) <= byte_of.keys() else token.encode("utf-8")
    has_byte_fallback, has_word_marks, has_word_pieces = "ByteFallback" in decoder, "\\u2581" in decoder, "WordPiece" in decoder

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
        raise DataError(f"{file} is not a tokenizer.json that the tokenizers library understands: {error}") from None


def download_from_hub(name: str, files: Sequence[str]) -> Path:
    """The folder with `files` of a hub repository, downloaded or from the hub's cache. Raises DataError where that fails."""
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (OSError, HfHubHTTPError, HFValidationError, httpx.HTTPError) as error:
        raise DataError(
            f"the tokenizer {name!r} is neither a local file or folder nor could it be fetched from the Hugging Face hub "
            f"({type(error).__name__}); give a folder with its tokenizer.json instead"
        ) from None


def _byte_level_words(pattern: str) -> pre_tokenizers.PreTokenizer:
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
