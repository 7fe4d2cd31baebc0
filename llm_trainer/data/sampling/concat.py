"""Concatenates token streams: the corpora of a mixture, or their held-out splits.

Nothing is copied; the result refers to the memory-mapped files of its parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TypedDict

import numpy as np

from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.errors import DataError


def concat_datasets(parts: Mapping[str, TokenDataset], source: str) -> TokenDataset:
    """Concatenate several streams in the order of `parts`.

    Args:
        parts: Name of the corpus → its tokens.
        source: What error messages call the result.

    Raises:
        DataError: The parts have different tokenizers or end-of-text tokens.
    """
    return TokenDataset(**concat_fields(parts, source))


class StreamFields(TypedDict):
    """The arguments of `TokenDataset`."""

    ids: list[np.ndarray]
    starts: list[np.ndarray]
    vocab_size: int
    tokenizer_hash: str
    fingerprint: str
    num_bytes: int | None
    eos_id: int | None
    largest_id: int | None
    source: str
    corpora: list[tuple[str, int]]
    tokenizer: Tokenizer | None


def concat_fields(parts: Mapping[str, TokenDataset], source: str) -> StreamFields:
    """The arguments of the `TokenDataset` that concatenates `parts`; raises as `concat_datasets`."""
    first_name, first = next(iter(parts.items()))
    for name, part in parts.items():
        if (part.tokenizer_hash, part.vocab_size, part.eos_id) != (
            first.tokenizer_hash,
            first.vocab_size,
            first.eos_id,
        ):
            raise DataError(
                f"{name} ({part.source}) and {first_name} ({first.source}) were prepared with different"
                " tokenizers; prepare one with the other's tokenizer: --tokenizer_path FOLDER"
            )
    sizes = [part.num_bytes for part in parts.values()]
    known = [size for size in sizes if size is not None]
    digest = hashlib.sha256("".join(f"{name} {part.fingerprint}\n" for name, part in parts.items()).encode())
    return StreamFields(
        ids=[ids for part in parts.values() for ids in part.id_arrays],
        starts=[starts for part in parts.values() for starts in part.start_arrays],
        vocab_size=first.vocab_size,
        tokenizer_hash=first.tokenizer_hash,
        fingerprint=digest.hexdigest(),
        num_bytes=sum(known) if len(known) == len(sizes) else None,
        eos_id=first.eos_id,
        largest_id=max(part.largest_id for part in parts.values()),
        source=source,
        corpora=[(name, part.num_tokens) for name, part in parts.items()],
        tokenizer=first.tokenizer,
    )
