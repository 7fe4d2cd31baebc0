"""Encoding in bulk: each word is looked up, and only a new one goes through the tokenizer's model.

Text repeats its words (Zipf 1935): where a tokenizer cuts text into words first, the ids of a text are the
ids of its words, one after the other, and most words have been seen before. The model is the tokenizer's own,
so there is nothing to prove about merges; the gain over both `tokenizers` and tiktoken, which take words
apart again and again, is in `docs/tokenizers.md`.

Where the rules of words are local (`boundaries.py`), many texts are cut and looked up at once by numpy. What
stands around characters beyond ASCII, and texts that have many of them, is cut by `words.py`, which is exact
for all of Unicode.

The first texts that a process encodes, up to `COMPARED` characters of them, are encoded by the library too:
where a single id differs, the library does all of it from there on. Memory is bounded: beyond `CACHE_WORDS`
words all are forgotten, and the frequent ones are soon back.
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
from llm_trainer.data.tokenization.fast.pretokenizer import BERT_WORDS, GPT2_PATTERN, Words
from llm_trainer.data.tokenization.fast.word_cache import CACHE_WORDS, WordTable
from llm_trainer.data.tokenization.tokenizer_json import byte_characters

COMPARED = 2**18
_BYTES_AT_ONCE = 2**17
_FOREIGN = 1 / 16  # of a text's characters, in further bytes: from here on a text is cut as a whole
_LONGEST_CACHED = 64  # characters
_ID = "I"  # uint32, as array and numpy call it
assert array(_ID).itemsize == 4


class FastEncoder:
    """Ids of texts by their words. `is_composed`: the tokenizer composes characters (NFC) first, so other
    texts are not for this way.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        pattern: str,
        ids_of_word: Callable[[str], list[int]],
        is_composed: bool,
    ) -> None:
        self._backend, self._words, self._is_composed = backend, Words(pattern), is_composed
        self._ids_of_word, self._known = ids_of_word, _KnownWords(ids_of_word)
        self._rules = RULES.get(pattern)
        self._table = WordTable(self._ids_of_stretch)
        self._left_to_compare = COMPARED
        self.agrees = True

    def encode(self, texts: Sequence[str]) -> list[np.ndarray | None]:
        """Ids of each text as int64 `(tokens,)`, or None where the library is to be asked."""
        found: list[np.ndarray | None] = [None] * len(texts)
        if not self.agrees:
            return found
        at_once: list[tuple[int, bytes]] = []
        for number, text in enumerate(texts):
            if self._is_composed and not unicodedata.is_normalized("NFC", text):
                continue
            raw = text.encode("utf-8")
            if self._rules is None or len(raw) - len(text) > len(text) * _FOREIGN:
                found[number] = np.frombuffer(self._ids_of(text), np.uint32).astype(np.int64)
            else:
                at_once.append((number, raw))
        for some in _groups(at_once):
            for (number, _), ids in zip(some, self._ids_at_once([raw for _, raw in some]), strict=True):
                found[number] = ids
        self._compare(texts, found)
        return found if self.agrees else [None] * len(texts)

    def _ids_at_once(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        assert self._rules is not None
        raw = b"\xff".join((b"", *texts, b""))
        buffer = np.frombuffer(raw, np.uint8)
        starts = word_starts(raw, self._rules)
        _join_around_foreign(starts, buffer)
        places = np.flatnonzero(starts)
        ids, ends = self._table.ids(raw, places)
        cuts = ends[np.flatnonzero(buffer[places] == SEPARATOR)]
        ids = ids.astype(np.int64)
        return [ids[start:end] for start, end in pairwise(cuts.tolist())]

    def _ids_of_stretch(self, raw: bytes) -> list[int]:
        """Ids of a word, or of what was left together for `Words` to cut; none of the separator."""
        if raw.isascii():
            return self._ids_of_word(raw.decode("ascii"))
        return (
            []
            if raw[0] == SEPARATOR
            else np.frombuffer(self._ids_of(raw.decode("utf-8")), np.uint32).tolist()
        )

    def _ids_of(self, text: str) -> bytes:
        known = self._known.__getitem__
        return b"".join([b"".join(map(known, words)) for words in self._words.cut(text)])

    def _compare(self, texts: Sequence[str], found: Sequence[np.ndarray | None]) -> None:
        for text, ids in zip(texts, found, strict=True):
            if ids is not None and 0 < len(text) <= self._left_to_compare:
                self._left_to_compare -= len(text)
                self.agrees &= self._backend.encode(text, add_special_tokens=False).ids == ids.tolist()


def _groups(texts: Sequence[tuple[int, bytes]]) -> Iterator[list[tuple[int, bytes]]]:
    """Texts in groups of about as many bytes as a processor's cache holds the arrays of."""
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


def _join_around_foreign(starts: np.ndarray, buffer: np.ndarray) -> None:
    """Leave what stands around bytes beyond ASCII together, from a letter's end before a space to the next:
    all patterns cut there.
    """
    foreign = np.flatnonzero((buffer >= 0x80) & (buffer != SEPARATOR))
    if len(foreign) == 0:
        return
    is_cut = np.zeros(len(buffer), bool)
    lower = buffer | 0x20
    is_cut[1:] = (lower[:-1] >= ord("a")) & (lower[:-1] <= ord("z")) & (buffer[1:] == ord(" "))
    is_cut |= buffer == SEPARATOR
    is_cut[1:] |= buffer[:-1] == SEPARATOR
    cuts = np.flatnonzero(is_cut)
    behind = np.unique(np.searchsorted(cuts, foreign, side="right"))
    for start, end in zip(cuts[behind - 1].tolist(), cuts[behind].tolist(), strict=True):
        starts[start + 1 : end] = False


class _KnownWords(dict[str, bytes]):
    """Word → its ids as bytes; learns what it is asked for."""

    def __init__(self, ids_of_word: Callable[[str], list[int]]) -> None:
        super().__init__()
        self._ids_of_word = ids_of_word

    def __missing__(self, word: str) -> bytes:
        raw = array(_ID, self._ids_of_word(word)).tobytes()
        if len(word) <= _LONGEST_CACHED:
            if len(self) >= CACHE_WORDS:
                self.clear()
            self[word] = raw
        return raw


def fast_encoder(backend: tokenizers.Tokenizer) -> FastEncoder | None:
    """The fast way for a tokenizer, or None where its words are cut, or its text is changed before, in a way
    that is not known here.
    """
    parts: Mapping[str, Any] = json.loads(backend.to_str())
    normalizer = parts.get("normalizer") or {}
    plain_text = all(
        token["special"] for token in parts.get("added_tokens") or []
    )  # other added tokens are found in the text first
    if not plain_text or normalizer.get("type") not in (None, "NFC") or parts["model"].get("dropout"):
        return None
    pattern, is_byte_level = _pattern_of(parts.get("pre_tokenizer") or {})
    if pattern is None or not Words.knows(pattern):
        return None
    return FastEncoder(
        backend, pattern, _word_encoder(backend, is_byte_level), normalizer.get("type") == "NFC"
    )


def _word_encoder(backend: tokenizers.Tokenizer, is_byte_level: bool) -> Callable[[str], list[int]]:
    tokenize = backend.model.tokenize
    if not is_byte_level:
        return lambda word: [token.id for token in tokenize(word)]
    stand_in = dict(enumerate(byte_characters()))
    return lambda word: [
        token.id for token in tokenize(word.encode("utf-8").decode("latin-1").translate(stand_in))
    ]


def _pattern_of(pre_tokenizer: Mapping[str, Any]) -> tuple[str | None, bool]:
    """(pattern of the words or None, whether words are bytes)."""
    kind = pre_tokenizer.get("type")
    if kind == "BertPreTokenizer":
        return BERT_WORDS, False
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
