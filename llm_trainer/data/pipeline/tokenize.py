"""Stages 4 and 5: samples training text for the tokenizer, and encodes the documents of each partition.

Both stages make the text of a partition again and write their result where they run, so that neither texts
nor ids travel between processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from llm_trainer.data.deduplication.clusters import EXCLUDED
from llm_trainer.data.hashing import hash_fractions
from llm_trainer.data.pipeline.deduplicate import REASONS, REJECTED
from llm_trainer.data.pipeline.document_index import SPLITS, open_rejected, write_rejected
from llm_trainer.data.pipeline.split_plan import PlannedPartition
from llm_trainer.data.pipeline.splits import SplitChunk
from llm_trainer.data.pipeline.stage_cache import Advance, stage_key, write_stats
from llm_trainer.data.sources import base as documents
from llm_trainer.data.sources.base import Rejected
from llm_trainer.data.token_shards import ShardWriter
from llm_trainer.data.tokenization.tokenizer import Tokenizer

SAMPLE_FILE = "sample.jsonl"
TEXTS_SUFFIX = ".texts"  # the texts of one partition and split, as lines of JSON
_BATCH_CHARACTERS = 2**20
_MAX_BUFFERED_DOCUMENTS = 256
_NO_LIMIT = 2**63


@dataclass(frozen=True)
class SampleTask:
    """Samples text of one partition's training documents for the tokenizer.

    Attributes:
        planned: The partition.
        fraction: The probability of each chunk; whether a chunk is drawn follows from its document's hash.
    """

    planned: PlannedPartition
    fraction: float

    @property
    def name(self) -> str:
        """The partition's name."""
        return self.planned.name

    @property
    def size(self) -> int:
        """Bytes that are read."""
        return self.planned.size

    @property
    def key(self) -> str:
        """The key of the result."""
        return stage_key("sample", *self.planned.inputs, self.fraction)

    def run(self, folder: Path, advance: Advance) -> None:
        """Write the drawn chunks into `folder`, one line of JSON each."""
        rows = self.planned.index.rows()
        hashes, sizes = rows["hash"], rows["size"]
        codes = np.frombuffer(self.planned.plan.codes, dtype=np.uint8)
        first_draw = hash_fractions(hashes, _salt(0))
        # A long document is drawn chunk by chunk.
        may_be_drawn = (first_draw < self.fraction) | (sizes > documents.CHUNK_BYTES)
        is_wanted = (codes == SPLITS.index("train")) & may_be_drawn
        row, number = -1, 0
        with (folder / SAMPLE_FILE).open("w", encoding="utf-8") as file:
            for chunk in self.planned.read_chunks(is_wanted.tobytes()):
                number = number + 1 if chunk.row == row else 0
                row = chunk.row
                if number == 0:
                    draw = first_draw[row]
                else:
                    draw = hash_fractions(hashes[row : row + 1], _salt(number))[0]
                if chunk.split == SPLITS.index("train") and draw < self.fraction:
                    file.write(json.dumps(chunk.text) + "\n")
                advance(len(chunk.text))


def _salt(number: int) -> str:
    return f"tokenizer sample {number}"


def read_sample(folders: Iterable[Path], max_bytes: float) -> Iterator[str]:
    """Read the sampled texts.

    Args:
        folders: The results of the sample tasks.
        max_bytes: Stop after this many bytes of text.
    """
    left = max_bytes
    for folder in folders:
        with (folder / SAMPLE_FILE).open(encoding="utf-8") as file:
            for line in file:
                text = json.loads(line)[: int(left)]
                left -= len(text.encode("utf-8"))
                yield text
                if left <= 0:
                    return


@dataclass(frozen=True)
class EncodeTask:
    """Encodes one partition's documents into one token file per split, which stage 6 concatenates.

    Attributes:
        planned: The partition.
        tokenizer: The tokenizer's folder.
        tokenizer_hash: Its hash, part of the key.
        min_length: Documents of fewer tokens are dropped.
        states: The partition's states of stage 2; if given, duplicates and documents that are too short are
            written to the file of rejected documents.
        with_texts: Write the texts next to the tokens.
    """

    planned: PlannedPartition
    tokenizer: Path
    tokenizer_hash: str
    min_length: int
    states: bytes | None
    with_texts: bool

    @property
    def name(self) -> str:
        """The partition's name."""
        return self.planned.name

    @property
    def size(self) -> int:
        """Bytes that are encoded."""
        return self.planned.size

    @property
    def key(self) -> str:
        """The key of the result."""
        states = None if self.states is None else hashlib.sha256(self.states).hexdigest()
        return stage_key(
            "encode", *self.planned.inputs, self.tokenizer_hash, self.min_length, states, self.with_texts
        )

    def run(self, folder: Path, advance: Advance) -> None:
        """Write the token files, and how many documents were cut by a split or dropped as too short."""
        tokenizer = load_tokenizer(self.tokenizer)
        cut = dropped = 0
        with contextlib.ExitStack() as stack:
            files: dict[int, _SplitFiles] = {}
            rejected = stack.enter_context(open_rejected(folder)) if self.states is not None else None
            for chunk, ids in _encoded(self._chunks(rejected), tokenizer):
                size = len(chunk.text) if chunk.text.isascii() else len(chunk.text.encode("utf-8"))
                advance(size)
                if chunk.is_whole and len(ids) < self.min_length:
                    dropped += 1
                    if rejected is not None:
                        reason = too_short_reason(self.min_length)
                        write_rejected(rejected, Rejected(reason, self._where(chunk.row), chunk.text))
                    continue
                if chunk.split not in files:
                    files[chunk.split] = stack.enter_context(
                        _SplitFiles(folder, SPLITS[chunk.split], tokenizer, self.with_texts)
                    )
                files[chunk.split].add(chunk, ids, size)
                cut += chunk.ends and chunk.is_cut
        write_stats(folder, {"cut": cut, "dropped": dropped})

    def _chunks(self, rejected: IO[bytes] | None) -> Iterator[SplitChunk]:
        """The text to encode; duplicates are written to `rejected`."""
        codes = self.planned.plan.codes
        if self.states is None or rejected is None:
            yield from self.planned.read_chunks(bytes(code != EXCLUDED for code in codes))
            return
        states = self.states
        for chunk in self.planned.read_chunks(bytes(state != REJECTED for state in states)):
            if states[chunk.row] in REASONS:
                reason = REASONS[states[chunk.row]]
                write_rejected(rejected, Rejected(reason, self._where(chunk.row), chunk.text))
            else:
                yield chunk

    def _where(self, row: int) -> str:
        return f"{self.name}, document {row + 1}"


def too_short_reason(min_length: int) -> str:
    """The reason for rejecting a document of fewer than `min_length` tokens."""
    return f"shorter than min_length {min_length}"


@lru_cache(maxsize=1)  # a worker process loads it once, not for each partition
def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of stage 4."""
    return Tokenizer.load(folder)


class _SplitFiles:
    """The files of one partition and split: tokens, and optionally the texts as lines of JSON."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, with_texts: bool) -> None:
        self._tokens = ShardWriter(
            folder,
            split,
            vocab_size=tokenizer.vocab_size,
            tokenizer_hash=tokenizer.hash,
            eos_id=tokenizer.eos_id,
            shard_tokens=_NO_LIMIT,
        )
        self._texts = (
            (folder / f"{split}{TEXTS_SUFFIX}").open("w", encoding="utf-8", newline="\n")
            if with_texts
            else None
        )
        self._is_first = True
        self._buffer: list[np.ndarray] = []  # complete documents, which are written several at a time
        self._buffered_bytes = 0

    def __enter__(self) -> _SplitFiles:
        return self

    def add(self, chunk: SplitChunk, ids: np.ndarray, size: int) -> None:
        """Add a chunk of a document; `size` is in bytes."""
        if chunk.is_whole:
            self._buffer.append(ids)
            self._buffered_bytes += size
            if len(self._buffer) == _MAX_BUFFERED_DOCUMENTS or self._buffered_bytes >= _BATCH_CHARACTERS:
                self._flush()
        else:
            self._flush()
            self._tokens.add(ids, size)
            if chunk.ends:
                self._tokens.end_document(append_eos=not chunk.is_cut)
        if self._texts is not None:
            opening, closing = '{"text": "' if self._is_first else "", '"}\n' if chunk.ends else ""
            self._texts.write(opening + json.dumps(chunk.text, ensure_ascii=False)[1:-1] + closing)
        self._is_first = chunk.ends

    def _flush(self) -> None:
        if self._buffer:
            self._tokens.add_documents(self._buffer, self._buffered_bytes)
            self._buffer, self._buffered_bytes = [], 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._texts is not None:
            self._texts.close()
        if kind is None:
            self._flush()
        self._tokens.__exit__(kind)


def _encoded(chunks: Iterable[SplitChunk], tokenizer: Tokenizer) -> Iterator[tuple[SplitChunk, np.ndarray]]:
    """The ids of each chunk, in order.

    Every document begins with the tokenizer's prefix, and so does each part of a document that a split cuts.
    """
    is_begin = True
    for batch in _batches(chunks):
        begins = []
        for chunk in batch:
            begins.append(is_begin)
            is_begin = chunk.ends
        texts = [chunk.text for chunk in batch]
        yield from zip(batch, tokenizer.encode_to_arrays(texts, begins), strict=True)


def _batches(chunks: Iterable[SplitChunk]) -> Iterator[list[SplitChunk]]:
    batch: list[SplitChunk] = []
    characters = 0
    for chunk in chunks:
        batch.append(chunk)
        characters += len(chunk.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
