"""Cleaning: readings of a unit in, readings out, each document normalised and judged, none lost on the way.

It is a pure function of the texts and the settings, and has no state from one document to the next. So
whoever needs a text a second time, to tokenise it, cleans it again rather than keeping a copy, in any
process. Documents out = documents in, one for one and in the same order: as pieces, or as `Rejected` with the
reason and the text.

A document of more than `documents.PIECE_BYTES` is never held whole: it is judged by its first piece.
Normalisation is the same for pieces as for the whole; a filter that changes texts (`c4`) leaves such a
document as it is.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from pydantic import JsonValue

from llm_trainer.config.schema.data import DataConfig
from llm_trainer.data.cleaning import filters
from llm_trainer.data.cleaning.filters import Filter
from llm_trainer.data.cleaning.normalization import TextNormalizer
from llm_trainer.data.sources.base import Rejected, SourceItem, TextChunk, rechunk

_VERSION = 1  # part of the key: raise it when the same text would be cleaned otherwise
NOTHING_LEFT_REASON = "nothing left after cleaning"


@dataclass(frozen=True)
class DocumentCleaner:
    """What is done to documents between reading and everything else; picklable."""

    normalization: TextNormalizer | None = None
    filters: tuple[Filter, ...] = ()

    @classmethod
    def of(cls, config: DataConfig) -> DocumentCleaner:
        """What the settings ask for. Filters judge in the setting's order, the language last; the first that
        refuses gives the reason.

        Raises UsageError, naming the extra, for a filter whose library is missing.
        """
        chosen = [filters.build_filter(name, config) for name in config.filters]
        if config.languages:
            from llm_trainer.data.cleaning.language_filter import LanguageFilter

            chosen.append(LanguageFilter.of(config))
        return cls(TextNormalizer.of(config) if config.clean else None, tuple(chosen))

    @property
    def is_identity(self) -> bool:
        """Whether it leaves everything as it is."""
        return self.normalization is None and not self.filters

    @property
    def key(self) -> JsonValue:
        """Everything that decides what comes out; None where nothing is done."""
        if self.is_identity:
            return None
        form = self.normalization
        return {
            "version": _VERSION,
            "normalization": None
            if form is None
            else {**asdict(form), "unicode": unicodedata.unidata_version},
            "filters": [chosen.key for chosen in self.filters],
        }

    def apply(
        self, readings: Iterator[SourceItem], judge: bool = True, where: str = ""
    ) -> Iterator[SourceItem]:
        """Clean every document of `readings`; what was rejected before stays so.

        Without `judge` no filter refuses anything, for texts whose verdict is known: the others come out
        exactly as with it. `where` is what rejected documents' places begin with: "<where>document 3" is the
        third of these readings, rejected ones counted.
        """
        if self.is_identity:
            yield from readings
            return
        readings = iter(readings)
        for number, reading in enumerate(
            readings, 1
        ):  # `_long` takes the rest of its document from the same iterator
            if isinstance(reading, Rejected):
                yield reading
            elif reading.is_last:
                yield self._whole(reading, judge, f"{where}document {number}")
            else:
                yield from self._long(reading, readings, judge, f"{where}document {number}")

    def _whole(self, piece: TextChunk, judge: bool, where: str) -> SourceItem:
        text = piece.text if self.normalization is None else self.normalization.text(piece.text)
        if not text or text.isspace():
            return Rejected(NOTHING_LEFT_REASON, where, piece.text)
        for chosen in self.filters:
            if judge or chosen.changes_text:
                reason, changed = chosen.apply(text)
                if reason is not None and judge:
                    return Rejected(reason, where, text)
                text = changed if reason is None else text
        return TextChunk(text, True, piece.split)

    def _long(
        self, first: TextChunk, rest: Iterator[SourceItem], judge: bool, where: str
    ) -> Iterator[SourceItem]:
        """A document in pieces; `rest` is read to the document's end and not beyond."""
        texts = _texts(first, rest)
        blocks = texts if self.normalization is None else self.normalization.blocks(texts)
        pieces = rechunk(blocks, first.split)
        head = next(pieces)
        is_blank = head.is_last and (not head.text or head.text.isspace())
        reason = NOTHING_LEFT_REASON if is_blank else self._refusal(head.text) if judge else None
        if reason is None:
            yield head
            yield from pieces
            return
        for _ in pieces:  # the document's end
            pass
        yield Rejected(reason, where, head.text)

    def _refusal(self, text: str) -> str | None:
        for chosen in self.filters:
            reason, _ = chosen.apply(text)
            if reason is not None:
                return reason
        return None


def _texts(first: TextChunk, rest: Iterator[SourceItem]) -> Iterator[str]:
    """The texts of one document's pieces."""
    piece: SourceItem = first
    while True:
        assert isinstance(piece, TextChunk), "a document in pieces ends with a piece"
        yield piece.text
        if piece.is_last:
            return
        piece = next(rest)
