"""How documents are packed into rows, and how much each strategy wastes.

* `greedy`: documents are concatenated and cut where a row is full. Only the last row is padded, but most
  documents of about a row's length are cut.
* `first_fit`: each document goes complete into the first open row that has room; longer ones are cut at the
  row's length. There is a little padding and few cuts.
* `none`: each document has a row of its own, a long one several. Short documents are mostly padding.

`first_fit` works online, so that memory does not grow with the corpus: at most `MAX_OPEN_ROWS` rows are open
at once, in the order in which they were opened. A document that fits none of them opens a new row, for which
the fullest one is closed (the oldest among equals).

`stride` is the overlap between neighbouring chunks of one text, in tokens, as in Hugging Face's tokenizers.
The repeated tokens are context only: their labels count in the earlier chunk, so that every token is still
learned once per epoch and no loss counts one twice.

A *segment* is the part of one document that one row holds. Its labels are the `count` tokens of the stream
from `first` on; its inputs are the tokens one position earlier. Where documents end with an end-of-text
token, that token also precedes each document as an input (the segment's flag `opens`), as in
`window_sampler.py`: every token of a document is then a label in exactly one segment. Without such a token,
the first token of a document is an input but never a label.
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
MAX_OPEN_ROWS = 256
SEGMENT = np.dtype([("first", "<u8"), ("count", "<u4"), ("overlap", "<u4"), ("opens", "?")])
_BLOCK = 2**14  # segments computed at once
_DEFAULT_CONTEXT = 1024  # row length for the statistics where max_length is not set
_MEASURED_DOCUMENTS = 200_000


@dataclass(frozen=True)
class Packing:
    """How documents become rows.

    Attributes:
        strategy: See the module's docstring.
        stride: Overlap of neighbouring chunks of one text, in tokens.
        mask_documents: Tokens attend only to their own document.
    """

    strategy: Strategy = "greedy"
    stride: int = 0
    mask_documents: bool = True

    @classmethod
    def from_config(cls, config: DataConfig) -> Packing:
        """The packing that the settings describe."""
        strategy: Strategy = config.packing_strategy if config.pack_sequences else "none"
        return cls(strategy, config.stride, config.mask_documents)

    def to_json(self) -> dict[str, JsonValue]:
        """What metadata.json stores, so that training packs as the data was prepared for."""
        return {"strategy": self.strategy, "stride": self.stride}

    @classmethod
    def from_json(cls, stored: JsonValue | None) -> Packing:
        """Read what `to_json` wrote; a missing or unknown strategy becomes greedy."""
        known = stored if isinstance(stored, Mapping) else {}
        strategy, stride = known.get("strategy"), known.get("stride")
        if strategy not in STRATEGIES:
            return cls()
        return cls(strategy, stride if isinstance(stride, int) else 0)

    def apply_to_unset(self, config: DataConfig) -> None:
        """Set the packing settings that the user did not set to those of this packing."""
        if not config.is_set("pack_sequences"):
            config.pack_sequences = self.strategy != "none"
        if not config.is_set("packing_strategy") and self.strategy != "none":
            config.packing_strategy = self.strategy
        if not config.is_set("stride"):
            config.stride = self.stride

    def chunk_step(self, context: int) -> int:
        """Tokens from the beginning of one chunk to that of the next.

        Args:
            context: Tokens per row.

        Raises:
            UsageError: The stride is not smaller than a row.
        """
        if self.stride >= context:
            raise UsageError(
                f"stride={self.stride} must be smaller than the length of a row, {context} tokens;"
                " lower stride, or raise max_length"
            )
        return context - self.stride

    def __str__(self) -> str:
        return f"{self.strategy}, stride {self.stride}" if self.stride else self.strategy


@dataclass(frozen=True)
class PackingStats:
    """What a strategy makes of documents; `positions` = `supervised` + `repeated` + `padding`.

    Attributes:
        rows: Number of rows.
        positions: Rows × context.
        supervised: Positions with a label.
        repeated: Positions that repeat tokens of the chunk before (overlaps).
        documents: Number of documents.
        cut: Documents that are in more than one row.
    """

    rows: int
    positions: int
    supervised: int
    repeated: int
    documents: int
    cut: int

    @property
    def padding(self) -> int:
        """Positions that hold no token."""
        return self.positions - self.supervised - self.repeated

    @property
    def waste(self) -> float:
        """Fraction of the positions that contribute no loss: padding and overlaps."""
        return 1 - self.supervised / self.positions if self.positions else 0.0


def measure_packing(
    document_lengths: Sequence[int] | np.ndarray, context: int, packing: Packing
) -> PackingStats:
    """What `packing` makes of documents of these lengths, in this order, without reading any text.

    Args:
        document_lengths: In tokens, end-of-text tokens included.
        context: Tokens per row.
        packing: How documents become rows.

    Raises:
        UsageError: The stride is not smaller than a row.
    """
    lengths = np.asarray(document_lengths, dtype=np.int64)
    ends = np.cumsum(lengths)
    tokens, step = int(lengths.sum()), packing.chunk_step(context)
    if packing.strategy == "greedy":
        labels = max(0, tokens - 1)  # the first token of a stream is an input only
        rows = count_greedy_rows(tokens, context, packing.stride)
        first_row, last_row = (
            np.maximum(0, -(-(offset - context) // step)) for offset in (ends - lengths, ends - 1)
        )
        return PackingStats(
            rows,
            rows * context,
            labels,
            max(0, rows - 1) * packing.stride,
            len(lengths),
            int((first_row != last_row).sum()),
        )
    rows = repeated = 0
    packed = pack_segments(
        split_documents([(ends - lengths, lengths)], context, packing.stride, has_eos=True),
        context,
        packing.strategy,
    )
    for row in packed:
        rows += 1
        repeated += sum(segment[2] for segment in row)
    return PackingStats(rows, rows * context, tokens, repeated, len(lengths), int((lengths > context).sum()))


def count_greedy_rows(tokens: int, context: int, stride: int = 0) -> int:
    """Number of windows that greedy makes of a stream of `tokens` tokens, a shorter last one included."""
    return 0 if tokens < 2 else 1 + -(-max(0, tokens - 1 - context) // (context - stride))


def format_packing_stats(
    document_lengths: Sequence[int] | np.ndarray, context: int | None, chosen: Packing
) -> list[str]:
    """Lines of a summary that compare the waste of all strategies.

    Args:
        document_lengths: In tokens; only the first 200,000 are measured.
        context: Tokens per row; None (max_length is not set) measures rows of 1,024, if the stride allows.
        chosen: The packing that the user has chosen, whose stride is used.
    """
    lengths = np.asarray(document_lengths)
    if context is None and chosen.stride >= _DEFAULT_CONTEXT:
        return []
    context = context or _DEFAULT_CONTEXT
    measured = lengths[:_MEASURED_DOCUMENTS]
    part = f", first {_MEASURED_DOCUMENTS:,} documents" if len(lengths) > len(measured) else ""
    lines = [f"packing into rows of {context:,} tokens (chosen: {chosen}{part}):"]
    for strategy in STRATEGIES:
        stats = measure_packing(measured, context, Packing(strategy, chosen.stride))
        line = f"  {strategy}: {stats.rows:,} rows, {stats.padding / max(1, stats.positions):.1%} padding"
        if chosen.stride:
            line += f", {stats.repeated / max(1, stats.positions):.1%} overlap"
        lines.append(line + f", {stats.cut / max(1, stats.documents):.1%} of the documents cut")
    return lines


def split_documents(
    documents: Iterable[tuple[np.ndarray, np.ndarray]], context: int, stride: int, *, has_eos: bool
) -> Iterator[np.ndarray]:
    """Split documents into segments of at most `context` labels.

    Args:
        documents: Blocks of (first token of each document in the stream, its length), int64 `(documents,)`.
        context: Tokens per row.
        stride: Tokens of the chunk before that a chunk repeats.
        has_eos: Documents end with an end-of-text token, which also precedes them.

    Yields:
        Arrays of `SEGMENT`, in order.
    """
    step = Packing(stride=stride).chunk_step(context)
    for starts, lengths in documents:
        num_labels = lengths.astype(np.int64) - (not has_eos)
        labels = starts.astype(np.int64) + (not has_eos)
        counts = np.where(num_labels > context, 1 + -(-(num_labels - context) // step), num_labels > 0)
        ends = np.cumsum(counts)
        for begin in range(0, int(ends[-1]) if len(ends) else 0, _BLOCK):
            numbers = np.arange(begin, min(begin + _BLOCK, int(ends[-1])))
            owner = np.searchsorted(ends, numbers, side="right")
            chunk = numbers - (ends[owner] - counts[owner])
            segments = np.empty(len(numbers), dtype=SEGMENT)
            segments["first"] = labels[owner] + chunk * step
            segments["count"] = np.minimum(context, num_labels[owner] - chunk * step)
            segments["overlap"] = np.where(chunk > 0, stride, 0)
            segments["opens"] = (chunk == 0) & has_eos
            yield segments


Segment = tuple[int, int, int, bool]  # the fields of a SEGMENT as Python numbers


def pack_segments(
    segments: Iterable[np.ndarray], context: int, strategy: Strategy
) -> Iterator[list[Segment]]:
    """Pack segments into rows; memory does not grow with their number.

    Args:
        segments: Arrays of `SEGMENT`.
        context: Tokens per row.
        strategy: `first_fit` or `none`.

    Yields:
        Rows: lists of segments that together have at most `context` labels.
    """
    if strategy == "none":
        for block in segments:
            yield from ([segment] for segment in block.tolist())
        return
    open_rows = _OpenRows(context)
    for block in segments:
        for segment in block.tolist():
            yield from open_rows.add(segment)
    yield from open_rows.close()


class _OpenRows:
    """First fit over a bounded number of open rows."""

    def __init__(self, context: int) -> None:
        self._context = context
        self._room = np.zeros(MAX_OPEN_ROWS, dtype=np.int64)  # of the open rows, in the order of opening
        self._rows: list[list[Segment]] = []

    def add(self, segment: Segment) -> Iterator[list[Segment]]:
        """Put a segment into the first row with room; yields the rows that this closes."""
        count = segment[1]
        if count == self._context:
            yield [segment]
            return
        number = len(self._rows)
        fits = self._room[:number] >= count
        chosen = int(fits.argmax()) if number else 0
        if not number or not fits[chosen]:
            if number == MAX_OPEN_ROWS:
                yield self._remove(int(self._room.argmin()))
            chosen = len(self._rows)
            self._rows.append([])
            self._room[chosen] = self._context
        self._rows[chosen].append(segment)
        self._room[chosen] -= count
        if not self._room[chosen]:
            yield self._remove(chosen)

    def close(self) -> list[list[Segment]]:
        """All rows that are still open."""
        rows, self._rows = self._rows, []
        return rows

    def _remove(self, index: int) -> list[Segment]:
        self._room[index : len(self._rows) - 1] = self._room[index + 1 : len(self._rows)].copy()
        return self._rows.pop(index)
