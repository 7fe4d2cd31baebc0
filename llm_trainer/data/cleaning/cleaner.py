"""Cleans the documents of a partition: each is normalized, then kept or rejected with a reason.

Cleaning is a pure function of the texts and the settings, without state between documents. So whatever needs
a text a second time, such as tokenization, cleans it again, in any process, instead of keeping a copy.
Documents go out one for one and in the order in which they came in: as text chunks, or as `Rejected` with the
reason and the text.

A document of more than `CHUNK_BYTES` is never entirely in memory: it is kept or rejected by its first
chunk. Normalization gives the same result in chunks as on the complete text; a filter that changes texts
(`c4`) leaves such a document unchanged.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from pydantic import JsonValue

from llm_trainer.config.schema.data import DataConfig
from llm_trainer.data.cleaning.base import Filter
from llm_trainer.data.cleaning.datatrove_filters import DatatroveFilter
from llm_trainer.data.cleaning.filters import LengthFilter, RepetitionFilter, SymbolFilter
from llm_trainer.data.cleaning.language_filter import LanguageFilter
from llm_trainer.data.cleaning.normalization import TextNormalizer
from llm_trainer.data.sources.base import Rejected, SourceItem, TextChunk, rechunk

_VERSION = 1  # part of the key; it must grow when the same text would be cleaned differently
NOTHING_LEFT_REASON = "nothing left after cleaning"


@dataclass(frozen=True)
class DocumentCleaner:
    """What is done to documents after reading; picklable.

    Attributes:
        normalization: The text normalization, if any.
        filters: The filters, in order; the first that rejects a document determines the reason.
    """

    normalization: TextNormalizer | None = None
    filters: tuple[Filter, ...] = ()

    @classmethod
    def from_config(cls, config: DataConfig) -> DocumentCleaner:
        """Build the cleaner of a configuration: its filters in their order, then that of languages.

        Raises:
            UsageError: A filter's library is not installed; the message names the extra.
        """
        filters = [build_filter(name, config) for name in config.filters]
        if config.languages:
            filters.append(LanguageFilter.from_config(config))
        return cls(TextNormalizer.from_config(config) if config.clean else None, tuple(filters))

    @property
    def is_identity(self) -> bool:
        """Whether it leaves every document unchanged."""
        return self.normalization is None and not self.filters

    @property
    def key(self) -> JsonValue:
        """Everything that determines the result, for cache keys; None if nothing is done."""
        if self.is_identity:
            return None
        normalization = self.normalization
        return {
            "version": _VERSION,
            "normalization": None
            if normalization is None
            else {**asdict(normalization), "unicode": unicodedata.unidata_version},
            "filters": [document_filter.key for document_filter in self.filters],
        }

    def apply(
        self, items: Iterator[SourceItem], apply_filters: bool = True, where: str = ""
    ) -> Iterator[SourceItem]:
        """Clean every document; documents that are already rejected are passed through.

        Args:
            items: Text chunks and rejected documents, from a source.
            apply_filters: Whether filters may reject documents. Without them, for texts that are known to be
                kept, the result is the same as with them.
            where: The beginning of a rejected document's position: "<where>document 3" is the third of
                `items`, rejected ones included.
        """
        if self.is_identity:
            yield from items
            return
        items = iter(items)
        # `_clean_long` takes the rest of its document from the same iterator.
        for number, item in enumerate(items, 1):
            if isinstance(item, Rejected):
                yield item
            elif item.is_last:
                yield self._clean(item, apply_filters, f"{where}document {number}")
            else:
                yield from self._clean_long(item, items, apply_filters, f"{where}document {number}")

    def _clean(self, chunk: TextChunk, apply_filters: bool, where: str) -> SourceItem:
        text = chunk.text if self.normalization is None else self.normalization.normalize(chunk.text)
        if not text or text.isspace():
            return Rejected(NOTHING_LEFT_REASON, where, chunk.text)
        for document_filter in self.filters:
            if apply_filters or document_filter.changes_text:
                reason, changed = document_filter.apply(text)
                if reason is not None and apply_filters:
                    return Rejected(reason, where, text)
                text = changed if reason is None else text
        return TextChunk(text, True, chunk.split)

    def _clean_long(
        self, first: TextChunk, rest: Iterator[SourceItem], apply_filters: bool, where: str
    ) -> Iterator[SourceItem]:
        """A document in several chunks; `rest` is read up to the document's end."""
        texts = _chunk_texts(first, rest)
        blocks = texts if self.normalization is None else self.normalization.normalize_blocks(texts)
        chunks = rechunk(blocks, first.split)
        head = next(chunks)
        is_blank = head.is_last and (not head.text or head.text.isspace())
        reason = (
            NOTHING_LEFT_REASON if is_blank else self._rejection_reason(head.text) if apply_filters else None
        )
        if reason is None:
            yield head
            yield from chunks
            return
        for _ in chunks:  # read up to the document's end
            pass
        yield Rejected(reason, where, head.text)

    def _rejection_reason(self, text: str) -> str | None:
        for document_filter in self.filters:
            reason, _ = document_filter.apply(text)
            if reason is not None:
                return reason
        return None


def build_filter(name: str, config: DataConfig) -> Filter:
    """Build one filter by its name, with the bounds of a configuration.

    Raises:
        UsageError: Its library is not installed; the message names the extra.
    """
    if name == "length":
        return LengthFilter(config.min_characters, config.max_characters)
    if name == "symbols":
        return SymbolFilter(config.max_symbol_fraction)
    if name == "repetition":
        return RepetitionFilter(config.max_repeated_fraction)
    return DatatroveFilter.from_name(name)


def _chunk_texts(first: TextChunk, rest: Iterator[SourceItem]) -> Iterator[str]:
    """The texts of one document's chunks."""
    item: SourceItem = first
    while True:
        assert isinstance(item, TextChunk), "a document in several chunks ends with a chunk"
        yield item.text
        if item.is_last:
            return
        item = next(rest)
