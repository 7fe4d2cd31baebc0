"""Reads nanoGPT's data folders: `train.bin` and `val.bin` of uint16 ids, `meta.pkl` with the characters.

`meta.pkl` is a pickle, and loading a pickle can execute arbitrary code. The unpickler here builds only plain
containers, numbers and strings; a file that refers to any class or function is refused. This project writes
no pickles. Without `meta.pkl` the ids are GPT-2's, as nanoGPT assumes.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path

import numpy as np

from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.data.tokenization.tokenizer import TOKENIZER_FILE, Tokenizer
from llm_trainer.errors import DataError

TRAIN_FILE = "train.bin"
VALIDATION_FILE = "val.bin"
META_FILE = "meta.pkl"
GPT2_VOCAB_SIZE = 50257
UNKNOWN_TOKENIZER_HASH = "0" * 64
_CONTAINERS: dict[str, type] = {"set": set, "frozenset": frozenset, "bytearray": bytearray}
_BROKEN_PICKLE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
)
_SAMPLE = 2**20


def open_bin(file: Path, vocab_size: int, tokenizer_hash: str) -> TokenDataset:
    """Open a file of uint16 ids as one document.

    Args:
        file: The file, which is memory-mapped.
        vocab_size: Number of ids of the tokenizer.
        tokenizer_hash: `Tokenizer.hash` of the tokenizer.

    Raises:
        DataError: The file is empty or its size is odd.
    """
    size = file.stat().st_size
    if size == 0 or size % 2:
        raise DataError(
            f"{file} has {size} bytes, so it is not a file of uint16 ids; run nanoGPT's prepare.py again"
        )
    ids = np.memmap(file, dtype="<u2", mode="r").view(np.ndarray)
    starts = [np.zeros(1, dtype=np.int64)]
    fingerprint = _fingerprint(ids)
    return TokenDataset(
        [ids],
        starts,
        vocab_size=vocab_size,
        tokenizer_hash=tokenizer_hash,
        fingerprint=fingerprint,
        source=str(file),
    )


def read_vocabulary(folder: Path) -> tuple[Tokenizer | None, int, list[str]]:
    """Find the tokenizer of a nanoGPT folder: from meta.pkl, from a tokenizer.json next to it, or GPT-2's.

    Returns:
        The tokenizer (None if it is GPT-2's and cannot be loaded), its number of ids, and notes for the user.
    """
    if (folder / META_FILE).is_file():
        tokenizer = _character_tokenizer(folder / META_FILE)
        return tokenizer, tokenizer.vocab_size, [f"characters from {META_FILE}"]
    if (folder / TOKENIZER_FILE).is_file():
        tokenizer = Tokenizer.load(folder)
        return (
            tokenizer,
            tokenizer.vocab_size,
            [f"no {META_FILE}: the vocabulary is that of {TOKENIZER_FILE} in the same folder"],
        )
    note = f"no {META_FILE}: the ids are assumed to be GPT-2's ({GPT2_VOCAB_SIZE})"
    try:
        return Tokenizer.tiktoken("gpt2"), GPT2_VOCAB_SIZE, [note]
    except DataError as error:
        return None, GPT2_VOCAB_SIZE, [note, f"training works, but no text can be decoded: {error}"]


def read_meta(file: Path) -> dict[object, object]:
    """Read the dictionary in a meta.pkl without executing anything in it.

    Raises:
        DataError: The file holds anything but built-in containers, numbers and strings.
    """
    try:
        found = _ContainersOnly(io.BytesIO(file.read_bytes())).load()
    except _BROKEN_PICKLE as error:
        reason = str(error) or type(error).__name__
        raise DataError(
            f"{file} is not a meta.pkl that can be trusted: {reason};"
            " remove it or run nanoGPT's prepare.py again"
        ) from None
    if not isinstance(found, dict):
        raise DataError(
            f"{file} holds a {type(found).__name__}, not the dictionary that nanoGPT writes;"
            " run its prepare.py again"
        )
    return found


class _ContainersOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        # "__builtin__" is the module's name in old pickle protocols.
        found = _CONTAINERS.get(name) if module in ("builtins", "__builtin__") else None
        if found is None:
            raise pickle.UnpicklingError(
                f"it refers to {module}.{name}, and code in data files is not executed"
            )
        return found

    def persistent_load(self, _: object) -> object:
        raise pickle.UnpicklingError("it refers to objects outside the file")


def _character_tokenizer(file: Path) -> Tokenizer:
    table = read_meta(file).get("itos")
    if not isinstance(table, dict) or not table:
        raise DataError(f"{file} has no table 'itos' of characters; run nanoGPT's prepare.py again")
    characters = [table.get(index) for index in range(len(table))]
    texts = [character for character in characters if isinstance(character, str) and len(character) == 1]
    if len(texts) != len(table):
        raise DataError(
            f"{file}: 'itos' does not map 0 … {len(table) - 1} to single characters;"
            " run nanoGPT's prepare.py again"
        )
    return Tokenizer.from_alphabet(texts)


def _fingerprint(ids: np.ndarray) -> str:
    """sha256 over the length and evenly spaced blocks, the first and last included.

    It covers all ids of files up to 32 MB, and is quick for OpenWebText's 17 GB.
    """
    digest = hashlib.sha256(str(len(ids)).encode())
    starts = (
        range(0, len(ids), _SAMPLE)
        if len(ids) <= 16 * _SAMPLE
        else np.linspace(0, len(ids) - _SAMPLE, 16).astype(np.int64).tolist()
    )
    for start in starts:
        digest.update(np.ascontiguousarray(ids[start : start + _SAMPLE]).tobytes())
    return digest.hexdigest()
