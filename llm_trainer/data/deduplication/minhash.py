"""MinHash signatures of documents, and the keys of their bands for locality-sensitive hashing.

The scheme is FineWeb's (Penedo et al. 2024, arXiv:2406.17557): runs of 5 words, 112 hash functions in 14
bands of 8 rows. Two documents whose sets of runs have the Jaccard similarity s agree in all rows of a band
with probability s^8, and so in at least one band with probability 1 - (1 - s^8)^14: 0.2111 at s = 0.6, 0.5645
at 0.7, 0.9235 at 0.8, 0.9996 at 0.9. The curve is steepest near (1/14)^(1/8) = 0.72, which is called the
threshold. Broder 1997 has the method.

Only the keys of bands are stored, 8 bytes a band, 112 bytes a document: what the search for duplicates
compares is whether they are equal, and no text and no signature is needed again.
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

_VERSION = 1  # of signatures: raise it when the same text would give others
_DOCUMENTS_HELD = 4096


@dataclass(frozen=True)
class MinHasher:
    """Signatures of texts. `bands` × `rows` hash functions of runs of `ngram` words, drawn from `seed`."""

    bands: int = 14
    rows: int = 8
    ngram: int = 5
    seed: int = 1

    @classmethod
    def of(cls, config: DataConfig) -> MinHasher:
        """What the settings ask for. Raises UsageError where the library for it is not installed."""
        require_extra("rensa", "deduplication", "finding near-duplicates")
        return cls(config.near_duplicate_bands, config.near_duplicate_rows, config.near_duplicate_ngram)

    @property
    def key(self) -> JsonValue:
        """Everything that decides a signature; rensa counts the versions of its algorithm itself."""
        from rensa import RMinHash

        return {**asdict(self), "version": _VERSION, "rensa": int(RMinHash.ALGORITHM_VERSION)}

    @property
    def threshold(self) -> float:
        """The similarity at which being found turns from unlikely to likely."""
        return float((1 / self.bands) ** (1 / self.rows))

    def expected_recall(self, similarity: float) -> float:
        """The probability that two documents of this Jaccard similarity are found to be near-duplicates."""
        return 1 - (1 - similarity**self.rows) ** self.bands

    def signature(self, text: str) -> Signatures:
        """(bands × rows,) of one text of any length."""
        long = StreamingSignature(self)
        long.add(text)
        return long.end()

    def signatures(self, texts: Sequence[str]) -> Signatures:
        """(texts, bands × rows) of many short texts at once; together they should not be much longer than
        shingles.BLOCK_BYTES.
        """
        if not texts:
            return np.zeros((0, self.bands * self.rows), np.uint32)
        return self.least(*shingle_hashes(texts, self.ngram))

    def band_keys(self, signatures: Signatures) -> Hashes:
        """(n, bands): one number for the rows of each band."""
        rows = signatures.reshape(len(signatures), self.bands, self.rows).astype(np.uint64)
        keys = np.zeros(rows.shape[:2], np.uint64)
        for row in range(self.rows):
            keys = murmur_mix(keys ^ (rows[:, :, row] + np.uint64(row + 1 << 32)))
        return keys

    def least(self, hashes: Hashes, offsets: NDArray[np.int64]) -> Signatures:
        """(n, bands × rows): for each hash function the least value over each document's hashes."""
        from rensa import RMinHash

        found = RMinHash.digest_matrix_from_flat_token_hashes(
            hashes, offsets.astype(np.uint64), self.bands * self.rows, self.seed
        )
        return np.array(found.to_rows(), np.uint32)


class StreamingSignature:
    """The signature of a document that comes in pieces: each value is the least of the pieces', and so that
    of the whole.
    """

    def __init__(self, hasher: MinHasher) -> None:
        self._hasher, self._text = hasher, StreamingShingler(hasher.ngram)
        self._least = np.full(hasher.bands * hasher.rows, np.iinfo(np.uint32).max, np.uint32)

    def add(self, piece: str) -> None:
        """The next piece, cut anywhere."""
        for hashes in self._text.add(piece):
            self._take(hashes)

    def end(self) -> Signatures:
        """(bands × rows,) of all pieces."""
        for hashes in self._text.end():
            self._take(hashes)
        return self._least

    def _take(self, hashes: Hashes) -> None:
        if hashes.size:
            self._least = np.minimum(self._least, self._hasher.least(hashes, np.array([0, hashes.size]))[0])


class BandKeyWriter:
    """Writes the band keys of one document after the other: little-endian uint64, `bands` of them a document,
    nothing else.

    with BandWriter(file, hasher) as writer:
        writer.add(piece.text, piece.is_last)      # for each piece of each document
    """

    def __init__(self, file: Path, hasher: MinHasher) -> None:
        self._file, self._hasher = file.open("wb"), hasher
        self._waiting: list[str] = []
        self._held = 0
        self._long: StreamingSignature | None = None

    def __enter__(self) -> BandKeyWriter:
        return self

    def add(self, text: str, is_last: bool = True) -> None:
        """The next piece of a document; documents come in the order of their numbers."""
        if self._long is None and is_last and len(text) <= BLOCK_BYTES:
            self._waiting.append(text)
            self._held += len(text)
            if self._held >= BLOCK_BYTES // 2 or len(self._waiting) == _DOCUMENTS_HELD:
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
        self._write(self._hasher.signatures(self._waiting))
        self._waiting, self._held = [], 0

    def _write(self, signatures: Signatures) -> None:
        self._file.write(self._hasher.band_keys(signatures).astype("<u8").tobytes())
