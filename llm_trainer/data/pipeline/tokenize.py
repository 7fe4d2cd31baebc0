"""Stages 4 and 5: a sample of the training text for the tokenizer, and each unit's documents as token files.

Both make a unit's text again and write what comes of it where they run, so that neither texts nor ids travel
between processes.
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

from llm_trainer.data.pipeline.deduplicate import REASONS, REJECTED
from llm_trainer.data.pipeline.document_index import SPLITS, open_rejected, write_rejected
from llm_trainer.data.pipeline.split_plan import PlannedUnit
from llm_trainer.data.pipeline.splits import LEFT_OUT, Part, places
from llm_trainer.data.pipeline.stage_cache import Advance, key_of, write_facts
from llm_trainer.data.sources import base as documents
from llm_trainer.data.sources.base import Rejected
from llm_trainer.data.token_shards import ShardWriter
from llm_trainer.data.tokenization.tokenizer import Tokenizer

SAMPLE_FILE = "sample.jsonl"
TEXTS_SUFFIX = ".texts"  # a unit's texts of one split, as lines of JSON
_BATCH_CHARACTERS = 2**20
_DOCUMENTS_AT_ONCE = 256
_NO_LIMIT = 2**63


@dataclass(frozen=True)
class SampleTask:
    """Text of one unit's training documents for the tokenizer: each piece is drawn with the probability
    `share`, by its document's hash.
    """

    planned: PlannedUnit
    share: float

    @property
    def name(self) -> str:
        """The unit's."""
        return self.planned.name

    @property
    def size(self) -> int:
        """Bytes that are read."""
        return self.planned.size

    @property
    def key(self) -> str:
        """The key of the result."""
        return key_of("sample", *self.planned.inputs, self.share)

    def run(self, folder: Path, advance: Advance) -> None:
        """Write the drawn pieces, a line of JSON each."""
        rows = self.planned.table.rows()
        hashes, sizes = rows["hash"], rows["size"]
        codes = np.frombuffer(self.planned.plan.codes, dtype=np.uint8)
        first_draw = places(hashes, _salt(0))
        may_be_drawn = (first_draw < self.share) | (
            sizes > documents.PIECE_BYTES
        )  # a long document is drawn piece by piece
        is_wanted = (codes == SPLITS.index("train")) & may_be_drawn
        row, number = -1, 0
        with (folder / SAMPLE_FILE).open("w", encoding="utf-8") as file:
            for part in self.planned.parts(is_wanted.tobytes()):
                number = number + 1 if part.row == row else 0
                row = part.row
                draw = first_draw[row] if number == 0 else places(hashes[row : row + 1], _salt(number))[0]
                if part.split == SPLITS.index("train") and draw < self.share:
                    file.write(json.dumps(part.text) + "\n")
                advance(len(part.text))


def _salt(number: int) -> str:
    return f"tokenizer sample {number}"


def read_sample(folders: Iterable[Path], most_bytes: float) -> Iterator[str]:
    """The drawn texts, up to so many bytes of them."""
    left = most_bytes
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
    """One unit's documents as ids: a token file for each split that gets any, which `ShardWriter` joins to
    shards.

    With `states` (of stage 2) the documents that are left out as duplicates or as too short are written down
    as well; `with_texts` the texts beside the tokens.
    """

    planned: PlannedUnit
    tokenizer: Path
    tokenizer_hash: str
    min_length: int
    states: bytes | None
    with_texts: bool

    @property
    def name(self) -> str:
        """The unit's."""
        return self.planned.name

    @property
    def size(self) -> int:
        """Bytes that are encoded."""
        return self.planned.size

    @property
    def key(self) -> str:
        """The key of the result."""
        states = None if self.states is None else hashlib.sha256(self.states).hexdigest()
        return key_of(
            "encode", *self.planned.inputs, self.tokenizer_hash, self.min_length, states, self.with_texts
        )

    def run(self, folder: Path, advance: Advance) -> None:
        """Write the token files, and in the facts how many documents were cut by a split and how many dropped
        as too short.
        """
        tokenizer = load_tokenizer(self.tokenizer)
        cut = dropped = 0
        with contextlib.ExitStack() as stack:
            files: dict[int, _SplitFiles] = {}
            rejected = stack.enter_context(open_rejected(folder)) if self.states is not None else None
            for part, ids in _encoded(self._parts(rejected), tokenizer):
                size = len(part.text) if part.text.isascii() else len(part.text.encode("utf-8"))
                advance(size)
                if part.is_whole and len(ids) < self.min_length:
                    dropped += 1
                    if rejected is not None:
                        write_rejected(
                            rejected, Rejected(too_short(self.min_length), self._where(part.row), part.text)
                        )
                    continue
                if part.split not in files:
                    files[part.split] = stack.enter_context(
                        _SplitFiles(folder, SPLITS[part.split], tokenizer, self.with_texts)
                    )
                files[part.split].add(part, ids, size)
                cut += part.ends and part.is_cut
        write_facts(folder, {"cut": cut, "dropped": dropped})

    def _parts(self, rejected: IO[bytes] | None) -> Iterator[Part]:
        """What is to be encoded; duplicates among it go to `rejected`."""
        codes = self.planned.plan.codes
        if self.states is None or rejected is None:
            yield from self.planned.parts(bytes(code != LEFT_OUT for code in codes))
            return
        states = self.states
        for part in self.planned.parts(bytes(state != REJECTED for state in states)):
            if states[part.row] in REASONS:
                write_rejected(
                    rejected, Rejected(REASONS[states[part.row]], self._where(part.row), part.text)
                )
            else:
                yield part

    def _where(self, row: int) -> str:
        return f"{self.name}, document {row + 1}"


def too_short(min_length: int) -> str:
    """The reason for rejecting a document of fewer tokens."""
    return f"shorter than min_length {min_length}"


@lru_cache(maxsize=1)  # a worker opens it once, not for each unit
def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of stage 4."""
    return Tokenizer.load(folder)


class _SplitFiles:
    """The files of one unit and split: tokens, and where asked for the texts, a line of JSON each."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, with_texts: bool) -> None:
        size, digest, end = tokenizer.vocab_size, tokenizer.hash, tokenizer.eos_id
        self._tokens = ShardWriter(
            folder, split, vocab_size=size, tokenizer_hash=digest, end_id=end, shard_tokens=_NO_LIMIT
        )
        self._texts = (
            (folder / f"{split}{TEXTS_SUFFIX}").open("w", encoding="utf-8", newline="\n")
            if with_texts
            else None
        )
        self._is_first = True
        self._waiting: list[np.ndarray] = []  # whole documents, which are written some at a time
        self._waiting_bytes = 0

    def __enter__(self) -> _SplitFiles:
        return self

    def add(self, part: Part, ids: np.ndarray, size: int) -> None:
        """A piece of a document; `size` in bytes."""
        if part.is_whole:
            self._waiting.append(ids)
            self._waiting_bytes += size
            if len(self._waiting) == _DOCUMENTS_AT_ONCE or self._waiting_bytes >= _BATCH_CHARACTERS:
                self._flush()
        else:
            self._flush()
            self._tokens.add(ids, size)
            if part.ends:
                self._tokens.end_document(append_end=not part.is_cut)
        if self._texts is not None:
            opening, closing = '{"text": "' if self._is_first else "", '"}\n' if part.ends else ""
            self._texts.write(opening + json.dumps(part.text, ensure_ascii=False)[1:-1] + closing)
        self._is_first = part.ends

    def _flush(self) -> None:
        if self._waiting:
            self._tokens.add_documents(self._waiting, self._waiting_bytes)
            self._waiting, self._waiting_bytes = [], 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._texts is not None:
            self._texts.close()
        if kind is None:
            self._flush()
        self._tokens.__exit__(kind)


def _encoded(parts: Iterable[Part], tokenizer: Tokenizer) -> Iterator[tuple[Part, np.ndarray]]:
    """Ids of each part, in order."""
    for batch in _batches(parts):
        yield from zip(batch, tokenizer.encode_to_arrays([part.text for part in batch]), strict=True)


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    batch: list[Part] = []
    held = 0
    for part in parts:
        batch.append(part)
        held += len(part.text)
        if held >= _BATCH_CHARACTERS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
