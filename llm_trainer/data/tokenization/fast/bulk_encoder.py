"""Encodes many texts at once: words are looked up, and only new words go through the tokenizer's model.

* What: where a tokenizer splits text into words first, the ids of a text are the ids of its words, one after
  the other, and most words have been encoded before (Zipf 1935). The model that encodes a new word is the
  tokenizer's own, so nothing depends on how merges are done. Where the pattern is simple enough
  (`ascii_pretokenizer.py`), numpy splits and looks up many texts at once. The surroundings of characters
  beyond ASCII, and texts that have many of them, are split by `pretokenizer.py`, which is exact for all of
  Unicode. Memory is bounded: beyond `MAX_CACHED_WORDS` words the cache is cleared, and frequent words are
  soon back.
* Why: 59 to 75 MB/s on one core, where splitting with `re` and looking up in a dictionary reaches 21 (Python
  source and prose). Preparing 1 GB with two workers is 9 times as fast as with `encode_batch_fast` of the
  `tokenizers` library under `datasets.map` (`benchmarks/data_preparation.py`).
* Must equal: the ids of the `tokenizers` library; `tests/data/tokenization/test_bulk_encoder.py` compares
  them on random text. In addition, the first texts that a process encodes, up to `VERIFIED_CHARACTERS`
  characters, are encoded by the library as well; if one id differs, the library encodes everything from then
  on.
* Switch off: LLM_TRAINER_FAST_TOKENIZER=0.
"""

from __future__ import annotations

import json
import unicodedata
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import tokenizers

from llm_trainer.data.tokenization.fast.ascii_pretokenizer import RULES, SEPARATOR, word_starts
from llm_trainer.data.tokenization.fast.pretokenizer import BERT_PATTERN, GPT2_PATTERN, RegexPreTokenizer
from llm_trainer.data.tokenization.fast.word_cache import MAX_CACHED_WORDS, WordCache
from llm_trainer.data.tokenization.tokenizer_json import bytes_to_unicode

VERIFIED_CHARACTERS = 2**18
_BYTES_AT_ONCE = 2**17
_MAX_NON_ASCII = 1 / 16  # further bytes per character; with more, a text is split as a whole by `re`
_MAX_CACHED_CHARACTERS = 64
_ID = "I"  # uint32 in array and numpy
assert array(_ID).itemsize == 4


class BulkEncoder:
    """Encodes texts word by word; `build_bulk_encoder` makes one for a tokenizer.

    Attributes:
        matches_library: False once an id has differed from the library's; nothing is encoded after that.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        pattern: str,
        ids_of_word: Callable[[str], list[int]],
        requires_nfc: bool,
    ) -> None:
        """Make empty caches.

        Args:
            backend: The tokenizer, which verifies the first texts.
            pattern: The pattern that splits its words.
            ids_of_word: Encodes one word.
            requires_nfc: The tokenizer normalizes text to NFC, so texts in another form are left to the
                library.
        """
        self._backend, self._pre_tokenizer, self._requires_nfc = (
            backend,
            RegexPreTokenizer(pattern),
            requires_nfc,
        )
        self._ids_of_word, self._known_words = ids_of_word, _WordDict(ids_of_word)
        self._rules = RULES.get(pattern)
        self._word_cache = WordCache(self._ids_of_span)
        self._left_to_verify = VERIFIED_CHARACTERS
        self.matches_library = True

    def encode(self, texts: Sequence[str]) -> list[np.ndarray | None]:
        """Encode texts.

        Returns:
            The ids of each text, int64 `(tokens,)`, or None for a text that is left to the library.
        """
        found: list[np.ndarray | None] = [None] * len(texts)
        if not self.matches_library:
            return found
        at_once: list[tuple[int, bytes]] = []
        for number, text in enumerate(texts):
            if self._requires_nfc and not unicodedata.is_normalized("NFC", text):
                continue
            raw = text.encode("utf-8")
            if self._rules is None or len(raw) - len(text) > len(text) * _MAX_NON_ASCII:
                found[number] = np.frombuffer(self._raw_ids(text), np.uint32).astype(np.int64)
            else:
                at_once.append((number, raw))
        for group in _groups(at_once):
            for (number, _), ids in zip(group, self._encode_group([raw for _, raw in group]), strict=True):
                found[number] = ids
        self._verify(texts, found)
        return found if self.matches_library else [None] * len(texts)

    def _encode_group(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        assert self._rules is not None
        raw = b"\xff".join((b"", *texts, b""))
        buffer = np.frombuffer(raw, np.uint8)
        starts = word_starts(raw, self._rules)
        _merge_around_non_ascii(starts, buffer)
        offsets = np.flatnonzero(starts)
        ids, ends = self._word_cache.ids(raw, offsets)
        boundaries = ends[np.flatnonzero(buffer[offsets] == SEPARATOR)]
        ids = ids.astype(np.int64)
        return [ids[start:end] for start, end in pairwise(boundaries.tolist())]

    def _ids_of_span(self, raw: bytes) -> list[int]:
        """The ids of a word, or of several words around a character beyond ASCII; none for the separator."""
        if raw.isascii():
            return self._ids_of_word(raw.decode("ascii"))
        if raw[0] == SEPARATOR:
            return []
        ids: list[int] = np.frombuffer(self._raw_ids(raw.decode("utf-8")), np.uint32).tolist()
        return ids

    def _raw_ids(self, text: str) -> bytes:
        known = self._known_words.__getitem__
        return b"".join([b"".join(map(known, words)) for words in self._pre_tokenizer.split(text)])

    def _verify(self, texts: Sequence[str], found: Sequence[np.ndarray | None]) -> None:
        for text, ids in zip(texts, found, strict=True):
            if ids is not None and 0 < len(text) <= self._left_to_verify:
                self._left_to_verify -= len(text)
                expected = self._backend.encode(text, add_special_tokens=False).ids
                self.matches_library &= expected == ids.tolist()


def _groups(texts: Sequence[tuple[int, bytes]]) -> Iterator[list[tuple[int, bytes]]]:
    """Texts in groups of about as many bytes as fit into a processor's cache with their arrays."""
    group: list[tuple[int, bytes]] = []
    held = 0
    for number, raw in texts:
        group.append((number, raw))
        held += len(raw)
        if held >= _BYTES_AT_ONCE:
            yield group
            group, held = [], 0
    if group:
        yield group


def _merge_around_non_ascii(starts: np.ndarray, buffer: np.ndarray) -> None:
    """Merge the words around bytes beyond ASCII, so that `RegexPreTokenizer` splits them.

    A merged span reaches from a space after a letter to the next such space: all patterns split there.
    """
    non_ascii = np.flatnonzero((buffer >= 0x80) & (buffer != SEPARATOR))
    if len(non_ascii) == 0:
        return
    is_boundary = np.zeros(len(buffer), bool)
    lower = buffer | 0x20
    is_boundary[1:] = (lower[:-1] >= ord("a")) & (lower[:-1] <= ord("z")) & (buffer[1:] == ord(" "))
    is_boundary |= buffer == SEPARATOR
    is_boundary[1:] |= buffer[:-1] == SEPARATOR
    boundaries = np.flatnonzero(is_boundary)
    following = np.unique(np.searchsorted(boundaries, non_ascii, side="right"))
    for start, end in zip(boundaries[following - 1].tolist(), boundaries[following].tolist(), strict=True):
        starts[start + 1 : end] = False


class _WordDict(dict[str, bytes]):
    """Word → its ids as bytes; a missing word is encoded and added."""

    def __init__(self, ids_of_word: Callable[[str], list[int]]) -> None:
        super().__init__()
        self._ids_of_word = ids_of_word

    def __missing__(self, word: str) -> bytes:
        raw = array(_ID, self._ids_of_word(word)).tobytes()
        if len(word) <= _MAX_CACHED_CHARACTERS:
            if len(self) >= MAX_CACHED_WORDS:
                self.clear()
            self[word] = raw
        return raw


def build_bulk_encoder(backend: tokenizers.Tokenizer) -> BulkEncoder | None:
    """Make the bulk encoder of a tokenizer.

    Args:
        backend: The tokenizer.

    Returns:
        None if its normalizer or pre-tokenizer is not known here, or if it looks for added tokens in the
        text.
    """
    parts: Mapping[str, Any] = json.loads(backend.to_str())
    normalizer = parts.get("normalizer") or {}
    # Added tokens that are not special are found in the text before it is split.
    all_special = all(token["special"] for token in parts.get("added_tokens") or [])
    if not all_special or normalizer.get("type") not in (None, "NFC") or parts["model"].get("dropout"):
        return None
    pattern, is_byte_level = _pattern_of(parts.get("pre_tokenizer") or {})
    if pattern is None or not RegexPreTokenizer.supports(pattern):
        return None
    return BulkEncoder(
        backend, pattern, _word_encoder(backend, is_byte_level), normalizer.get("type") == "NFC"
    )


def _word_encoder(backend: tokenizers.Tokenizer, is_byte_level: bool) -> Callable[[str], list[int]]:
    tokenize = backend.model.tokenize
    if not is_byte_level:
        return lambda word: [token.id for token in tokenize(word)]
    characters = dict(enumerate(bytes_to_unicode()))
    return lambda word: [
        token.id for token in tokenize(word.encode("utf-8").decode("latin-1").translate(characters))
    ]


def _pattern_of(pre_tokenizer: Mapping[str, Any]) -> tuple[str | None, bool]:
    """The pattern that splits words, or None, and whether words are bytes."""
    kind = pre_tokenizer.get("type")
    if kind == "BertPreTokenizer":
        return BERT_PATTERN, False
    if kind == "ByteLevel":
        is_plain = pre_tokenizer.get("use_regex", True) and not pre_tokenizer.get("add_prefix_space")
        return (GPT2_PATTERN if is_plain else None), True
    steps = pre_tokenizer.get("pretokenizers") or []
    if [step.get("type") for step in steps] != ["Split", "ByteLevel"]:
        return None, False
    split, byte_level = steps
    is_plain = (
        split.get("behavior") == "Isolated"
        and not split.get("invert")
        and not byte_level.get("add_prefix_space")
    )
    pattern = (split.get("pattern") or {}).get("Regex")
    return (pattern if is_plain and byte_level.get("use_regex") is False else None), True
