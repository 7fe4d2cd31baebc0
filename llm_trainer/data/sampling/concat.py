"""Several streams of ids read as one: the corpora of a mixture, or their held-out parts. Nothing is copied;
the files stay mapped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TypedDict

import numpy as np

from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.errors import DataError


def joined(parts: Mapping[str, TokenDataset], source: str) -> TokenDataset:
    """Several streams end to end, in this order. Raises DataError where tokenizers or ends of text differ."""
    return TokenDataset(**joined_fields(parts, source))


class StreamFields(TypedDict):
    """What a `TokenDataset` is made of."""

    ids: list[np.ndarray]
    starts: list[np.ndarray]
    vocab_size: int
    tokenizer_hash: str
    fingerprint: str
    num_bytes: int | None
    end_id: int | None
    largest_id: int | None
    source: str
    corpora: list[tuple[str, int]]


def joined_fields(parts: Mapping[str, TokenDataset], source: str) -> StreamFields:
    """Several streams end to end. Raises DataError where tokenizers or ends of text differ."""
    first_name, first = next(iter(parts.items()))
    for name, part in parts.items():
        if (part.tokenizer_hash, part.vocab_size, part.end_id) != (
            first.tokenizer_hash,
            first.vocab_size,
            first.end_id,
        ):
            raise DataError(
                f"{name} ({part.source}) and {first_name} ({first.source}) were prepared with different tokenizers; "
                "prepare one with the other's: --tokenizer_path FOLDER"
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
        end_id=first.end_id,
        largest_id=max(part.largest_id for part in parts.values()),
        source=source,
        corpora=[(name, part.num_tokens) for name, part in parts.items()],
    )
