"""How documents share rows, and what each way wastes.

greedy     documents end to end, cut where a row is full: no padding but in the last row; most documents of a
row's length are cut first_fit  each document whole into the first open row with room, longer ones cut at the
row's length: a little padding, few cuts none       each document a row of its own (a long one several):
nothing is shared, short documents are mostly padding

first_fit is online, so that memory does not grow with the corpus: at most `OPEN_ROWS` rows are open at once,
in the order in which they were opened; a document that fits none opens another, for which the fullest one is
closed (the oldest of equals).

`stride` is the overlap between neighbouring chunks of one text, in tokens. The repeated tokens are there to be seen: their labels count in
the earlier chunk alone, so every token is still learned once a pass and no loss counts one twice.

A *piece* is what one row holds of one document. Its labels are `count` tokens of the stream from `first` on;
its inputs are the tokens one place earlier. Where texts end in an end of text, that token also opens each
document (the piece says `opens`), as in `windows.py`: so every token of a document is a label in exactly one
piece. Without one, a document's first token predicts but is not predicted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import JsonValue

from llm_trainer.config.schema.data import DataConfig
from llm_trainer.errors import UsageError

Strategy = Literal["greedy", "first_fit", "none"]
STRATEGIES: tuple[Strategy, ...] = ("greedy", "first_fit", "none")
OPEN_ROWS = 256
PIECE = np.dtype([("first", "<u8"), ("count", "<u4"), ("overlap", "<u4"), ("opens", "?")])
_BLOCK = 2**14  # pieces made at once
_USUAL_CONTEXT = 1024  # of a model whose context nobody says
_MEASURED = 200_000  # documents that the waste is measured on


@dataclass(frozen=True)
class Packing:
    """How documents become rows. `stride`: overlap of neighbouring chunks in tokens; `mask_documents`: tokens
    see only their own.
    """

    strategy: Strategy = "greedy"
    stride: int = 0
    mask_documents: bool = True

    @classmethod
    def of(cls, config: DataConfig) -> Packing:
        """As the settings say."""
        strategy: Strategy = config.packing_strategy if config.pack_sequences else "none"
        return cls(strategy, config.stride, config.mask_documents)

    def to_json(self) -> dict[str, JsonValue]:
        """What metadata.json remembers, so that training packs as preparation was told."""
        return {"strategy": self.strategy, "stride": self.stride}

    @classmethod
    def from_json(cls, stored: JsonValue | None) -> Packing:
        """Read what `to_json` wrote; nothing, or nothing known, is greedy."""
        known = stored if isinstance(stored, Mapping) else {}
        strategy, stride = known.get("strategy"), known.get("stride")
        if strategy not in STRATEGIES:
            return cls()
        return cls(strategy, stride if isinstance(stride, int) else 0)

    def adopt_into(self, config: DataConfig) -> None:
        """Let settings that were not said be as the data was prepared."""
        if not config.is_said("pack_sequences"):
            config.pack_sequences = self.strategy != "none"
        if not config.is_said("packing_strategy") and self.strategy != "none":
            config.packing_strategy = self.strategy
        if not config.is_said("stride"):
            config.stride = self.stride

    def step(self, context: int) -> int:
        """Tokens from one chunk's beginning to the next one's. Raises UsageError where the overlap leaves
        none.
        """
        if self.stride >= context:
            raise UsageError(
                f"stride={self.stride} must be below the length of a row, {context} tokens; lower it, or lengthen the rows"
            )
        return context - self.stride

    def __str__(self) -> str:
        return f"{self.strategy}, stride {self.stride}" if self.stride else self.strategy


@dataclass(frozen=True)
class PackingFacts:
    """What a strategy makes of documents: `places` = rows × context = `supervised` + `repeated` (overlaps) +
    `padding`.

    `cut` documents lie in more than one row.
    """

    rows: int
    places: int
    supervised: int
    repeated: int
    documents: int
    cut: int

    @property
    def padding(self) -> int:
        """Places that hold nothing."""
        return self.places - self.supervised - self.repeated

    @property
    def waste(self) -> float:
        """Share of the places from which nothing is learned: padding and overlaps."""
        return 1 - self.supervised / self.places if self.places else 0.0


def packing_waste(
    document_lengths: Sequence[int] | np.ndarray, context: int, strategy: Strategy, stride: int = 0
) -> float:
    """Share of the places in rows of `context` from which nothing is learned (padding, overlaps), 0 … 1.

    `document_lengths` are in tokens, ends of text included. Raises UsageError for a stride of a row's length or more.
    """
    return measure_packing(document_lengths, context, Packing(strategy, stride)).waste


def measure_packing(
    document_lengths: Sequence[int] | np.ndarray, context: int, packing: Packing
) -> PackingFacts:
    """What `packing` makes of documents of these lengths, in their order, without reading them. Raises as
    `packing_waste`.
    """
    lengths = np.asarray(document_lengths, dtype=np.int64)
    ends = np.cumsum(lengths)
    tokens, step = int(lengths.sum()), packing.step(context)
    if packing.strategy == "greedy":
        labels = max(0, tokens - 1)  # of a stream its first token is seen only
        rows = greedy_rows(tokens, context, packing.stride)
        first_row, last_row = (
            np.maximum(0, -(-(place - context) // step)) for place in (ends - lengths, ends - 1)
        )
        return PackingFacts(
            rows,
            rows * context,
            labels,
            max(0, rows - 1) * packing.stride,
            len(lengths),
            int((first_row != last_row).sum()),
        )
    rows = repeated = 0
    placed = pack(
        cut_documents([(ends - lengths, lengths)], context, packing.stride, has_end=True),
        context,
        packing.strategy,
    )
    for row in placed:
        rows += 1
        repeated += sum(piece[2] for piece in row)
    return PackingFacts(rows, rows * context, tokens, repeated, len(lengths), int((lengths > context).sum()))


def greedy_rows(tokens: int, context: int, stride: int = 0) -> int:
    """Windows that a stream of so many tokens has under greedy, a shorter last one included."""
    return 0 if tokens < 2 else 1 + -(-max(0, tokens - 1 - context) // (context - stride))


def packing_lines(
    document_lengths: Sequence[int] | np.ndarray, context: int | None, chosen: Packing
) -> list[str]:
    """The waste of each strategy in words, for a summary; measured on the first 200,000 documents where there
    are more.

    Without a `context` (no max_length was said) it is that of rows of 1,024, if the overlap leaves such rows.
    """
    lengths = np.asarray(document_lengths)
    if context is None and chosen.stride >= _USUAL_CONTEXT:
        return []
    context = context or _USUAL_CONTEXT
    measured = lengths[:_MEASURED]
    of = f", of the first {_MEASURED:,} documents" if len(lengths) > len(measured) else ""
    lines = [f"packing into rows of {context:,} tokens (chosen: {chosen}{of}):"]
    for strategy in STRATEGIES:
        facts = measure_packing(measured, context, Packing(strategy, chosen.stride))
        line = f"  {strategy}: {facts.rows:,} rows, {facts.padding / max(1, facts.places):.1%} padding"
        if chosen.stride:
            line += f", {facts.repeated / max(1, facts.places):.1%} overlap"
        lines.append(line + f", {facts.cut / max(1, facts.documents):.1%} of the documents cut")
    return lines


def cut_documents(
    documents: Iterable[tuple[np.ndarray, np.ndarray]], context: int, stride: int, *, has_end: bool
) -> Iterator[np.ndarray]:
    """Pieces (PIECE) of at most `context` labels, in order, from blocks of (where documents begin, their
    lengths).

    A chunk repeats the last `stride` tokens of the one before it. `has_end`: documents end with an end of
    text, which opens them as well.
    """
    step = Packing(stride=stride).step(context)
    for starts, lengths in documents:
        places = lengths.astype(np.int64) - (not has_end)
        labels = starts.astype(np.int64) + (not has_end)
        counts = np.where(places > context, 1 + -(-(places - context) // step), places > 0)
        ends = np.cumsum(counts)
        for begin in range(0, int(ends[-1]) if len(ends) else 0, _BLOCK):
            numbers = np.arange(begin, min(begin + _BLOCK, int(ends[-1])))
            owner = np.searchsorted(ends, numbers, side="right")
            chunk = numbers - (ends[owner] - counts[owner])
            pieces = np.empty(len(numbers), dtype=PIECE)
            pieces["first"] = labels[owner] + chunk * step
            pieces["count"] = np.minimum(context, places[owner] - chunk * step)
            pieces["overlap"] = np.where(chunk > 0, stride, 0)
            pieces["opens"] = (chunk == 0) & has_end
            yield pieces


PieceFields = tuple[int, int, int, bool]  # a PIECE as Python numbers


def pack(pieces: Iterable[np.ndarray], context: int, strategy: Strategy) -> Iterator[list[PieceFields]]:
    """Rows, each a list of pieces that together have at most `context` labels; memory does not grow with
    their number.
    """
    if strategy == "none":
        for block in pieces:
            yield from ([piece] for piece in block.tolist())
        return
    open_rows = _OpenRows(context)
    for block in pieces:
        for piece in block.tolist():
            yield from open_rows.place(piece)
    yield from open_rows.close()


class _OpenRows:
    """First fit over a bounded number of open rows."""

    def __init__(self, context: int) -> None:
        self._context = context
        self._room = np.zeros(OPEN_ROWS, dtype=np.int64)  # of the open rows, in the order of their opening
        self._rows: list[list[PieceFields]] = []

    def place(self, piece: PieceFields) -> Iterator[list[PieceFields]]:
        """Put a piece into the first row with room; rows that this closes."""
        count = piece[1]
        if count == self._context:
            yield [piece]
            return
        number = len(self._rows)
        fits = self._room[:number] >= count
        chosen = int(fits.argmax()) if number else 0
        if not number or not fits[chosen]:
            if number == OPEN_ROWS:
                yield self._remove(int(self._room.argmin()))
            chosen = len(self._rows)
            self._rows.append([])
            self._room[chosen] = self._context
        self._rows[chosen].append(piece)
        self._room[chosen] -= count
        if not self._room[chosen]:
            yield self._remove(chosen)

    def close(self) -> list[list[PieceFields]]:
        """All rows that are still open."""
        rows, self._rows = self._rows, []
        return rows

    def _remove(self, index: int) -> list[PieceFields]:
        self._room[index : len(self._rows) - 1] = self._room[index + 1 : len(self._rows)].copy()
        return self._rows.pop(index)
