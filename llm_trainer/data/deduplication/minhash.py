"""MinHash signatures of documents, and the keys of their bands for locality-sensitive hashing (Broder 1997).

The scheme is FineWeb's (Penedo et al. 2024, arXiv:2406.17557): word 5-grams, and 112 hash functions in 14
bands of 8 rows. Two documents whose sets of n-grams have the Jaccard similarity s agree in all rows of a band
with probability s^8, and so in at least one band with probability 1 - (1 - s^8)^14: 0.2111 at s = 0.6, 0.5645
at 0.7, 0.9235 at 0.8, 0.9996 at 0.9. The curve is steepest near (1/14)^(1/8) = 0.72, which is called the
threshold.

Only the keys of bands are stored: 8 bytes per band, 112 bytes per document. The search for duplicates only
compares keys for equality, so neither the texts nor the signatures are needed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from llm_trainer.config.schema.data import DataConfig
from llm_trainer.data.deduplication.shingles import (
    BLOCK_BYTES,
    Hashes,
    StreamingShingler,
    murmur_mix,
    shingle_hashes,
)
from llm_trainer.data.optional_deps import require_extra

Signatures: TypeAlias = NDArray[np.uint32]

_VERSION = 1  # of signatures; it must grow when the same text would have another signature
_MAX_BUFFERED_DOCUMENTS = 4096


@dataclass(frozen=True)
class MinHasher:
    """Computes signatures with `bands` × `rows` hash functions of word n-grams.

    Attributes:
        bands: Number of bands; two documents are near-duplicates if they agree in one.
        rows: Hash functions per band.
        ngram: Words per n-gram.
        seed: The seed that the hash functions are drawn from.
    """

    bands: int = 14
    rows: int = 8
    ngram: int = 5
    seed: int = 1

    @classmethod
    def from_config(cls, config: DataConfig) -> MinHasher:
        """Build the hasher of a configuration. Raises UsageError if rensa is not installed."""
        require_extra("rensa", "deduplication", "finding near-duplicates")
        return cls(config.near_duplicate_bands, config.near_duplicate_rows, config.near_duplicate_ngram)

    @property
    def key(self) -> JsonValue:
        """Everything that determines a signature; rensa has a version of its algorithm."""
        from rensa import RMinHash

        return {**asdict(self), "version": _VERSION, "rensa": int(RMinHash.ALGORITHM_VERSION)}

    @property
    def threshold(self) -> float:
        """The Jaccard similarity around which the probability of being found rises from low to high."""
        return float((1 / self.bands) ** (1 / self.rows))

    def expected_recall(self, similarity: float) -> float:
        """Return the probability that two documents of this Jaccard similarity are found."""
        return 1 - (1 - similarity**self.rows) ** self.bands

    def signature(self, text: str) -> Signatures:
        """Return the signature of one text of any length, of shape (bands × rows,)."""
        signature = StreamingSignature(self)
        signature.add(text)
        return signature.end()

    def signatures(self, texts: Sequence[str]) -> Signatures:
        """Return the signatures of many short texts at once, of shape (texts, bands × rows).

        Together the texts should not be much longer than `shingles.BLOCK_BYTES`.
        """
        if not texts:
            return np.zeros((0, self.bands * self.rows), np.uint32)
        return self.min_hashes(*shingle_hashes(texts, self.ngram))

    def band_keys(self, signatures: Signatures) -> Hashes:
        """Return one number for the rows of each band, of shape (n, bands)."""
        rows = signatures.reshape(len(signatures), self.bands, self.rows).astype(np.uint64)
        keys = np.zeros(rows.shape[:2], np.uint64)
        for row in range(self.rows):
            keys = murmur_mix(keys ^ (rows[:, :, row] + np.uint64(row + 1 << 32)))
        return keys

    def min_hashes(self, hashes: Hashes, offsets: NDArray[np.int64]) -> Signatures:
        """Return the minimum of each hash function over each document's n-grams, of shape (n, bands × rows).

        Args:
            hashes: The hashes of all documents' n-grams, concatenated.
            offsets: The start of each document's hashes, and the end of the last (n + 1 values).
        """
        from rensa import RMinHash

        found = RMinHash.digest_matrix_from_flat_token_hashes(
            hashes, offsets.astype(np.uint64), self.bands * self.rows, self.seed
        )
        return np.array(found.to_rows(), np.uint32)


class StreamingSignature:
    """The signature of a document that comes in chunks: each value is the minimum over the chunks."""

    def __init__(self, hasher: MinHasher) -> None:
        self._hasher, self._shingler = hasher, StreamingShingler(hasher.ngram)
        self._minimum = np.full(hasher.bands * hasher.rows, np.iinfo(np.uint32).max, np.uint32)

    def add(self, chunk: str) -> None:
        """Add the next chunk of the text, which may end anywhere."""
        for hashes in self._shingler.add(chunk):
            self._update(hashes)

    def end(self) -> Signatures:
        """Return the signature of all chunks, of shape (bands × rows,)."""
        for hashes in self._shingler.end():
            self._update(hashes)
        return self._minimum

    def _update(self, hashes: Hashes) -> None:
        if hashes.size:
            self._minimum = np.minimum(
                self._minimum, self._hasher.min_hashes(hashes, np.array([0, hashes.size]))[0]
            )


class BandKeyWriter:
    """Writes the band keys of documents to a file: little-endian uint64, `bands` per document, nothing else.

    with BandKeyWriter(file, hasher) as writer:
        writer.add(chunk.text, chunk.is_last)      # for each chunk of each document
    """

    def __init__(self, file: Path, hasher: MinHasher) -> None:
        self._file, self._hasher = file.open("wb"), hasher
        self._buffered: list[str] = []
        self._buffered_characters = 0
        self._long: StreamingSignature | None = None

    def __enter__(self) -> BandKeyWriter:
        return self

    def add(self, text: str, is_last: bool = True) -> None:
        """Add the next chunk of a document; documents come in the order of their numbers."""
        if self._long is None and is_last and len(text) <= BLOCK_BYTES:
            self._buffered.append(text)
            self._buffered_characters += len(text)
            if (
                self._buffered_characters >= BLOCK_BYTES // 2
                or len(self._buffered) == _MAX_BUFFERED_DOCUMENTS
            ):
                self._flush()
            return
        if self._long is None:
            self._flush()
            self._long = StreamingSignature(self._hasher)
        self._long.add(text)
        if is_last:
            self._write(self._long.end()[None])
            self._long = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if error is None:
                self._flush()

    def _flush(self) -> None:
        self._write(self._hasher.signatures(self._buffered))
        self._buffered, self._buffered_characters = [], 0

    def _write(self, signatures: Signatures) -> None:
        self._file.write(self._hasher.band_keys(signatures).astype("<u8").tobytes())
