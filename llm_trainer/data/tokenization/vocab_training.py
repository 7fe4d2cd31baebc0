"""Vocabularies learned from text: byte-level BPE and WordPiece.

Byte-level BPE (Sennrich 2016, arXiv:1508.07909; bytes as in GPT-2) has no unknown text. Its words are cut by
the pattern of Llama 3 and GPT-4, which other engines know by name, not by one of our own: exports then
tokenise alike everywhere. WordPiece (Schuster 2012) is BERT's, with its case kept; white space and unknown
characters do not come back from it.

The tokenizers library could train both. Here `words.py` cuts the words, they are counted as they come, and
`merging.py` merges their symbols: the same vocabulary and the same merges (a test compares them), in less
time and a fraction of the memory, and WordPiece gets the same ids each time, which the library numbers by
chance. Two bounds hold whatever the text is:

* A run without a boundary (a line of base64, a genome) would be one word of any length: words are cut at `LONGEST_WORD` characters.
* No more than `MOST_WORDS` different words are held: beyond that the rarest are forgotten. Text of 100 MB has about half of them.
"""

from __future__ import annotations

import itertools
import operator
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from llm_trainer.data.tokenization.fast.bpe_trainer import learn_merges
from llm_trainer.data.tokenization.fast.pretokenizer import BERT_WORDS, PATTERN, Words
from llm_trainer.data.tokenization.tokenizer_json import (
    END_OF_TEXT,
    UNKNOWN,
    byte_characters,
    byte_level_words,
)
from llm_trainer.errors import DataError, UsageError

SMALLEST_BPE = 257  # every byte, and the end of text
SMALLEST_WORD_PIECE = 100
LONGEST_WORD = 256  # characters
MOST_WORDS = 2**21
_LARGEST_ALPHABET = 1000  # characters, of WordPiece; BERT's trainers use the same
_CONTINUES = "##"
_CLOSING = ".,!?;:)"
Word = TypeVar("Word", str, bytes)


@dataclass(frozen=True)
class TrainingEstimate:
    """What learning a vocabulary will take, roughly: seconds, and bytes of memory beyond what the process
    holds already.
    """

    seconds: float
    memory_bytes: float

    def __str__(self) -> str:
        return f"about {self.seconds:.0f} s and {self.memory_bytes / 1e6:.0f} MB of memory"


def training_estimate(sample_bytes: float) -> TrainingEstimate:
    """What learning from so many bytes of text takes on a core of 2024, if it does not repeat itself;
    repetition makes it less.

    Measured at 10 to 100 MB: different words, which decide the memory, grow more slowly than text (Heaps),
    time in proportion to it.
    """
    return TrainingEstimate(2 + sample_bytes / 7e6, 30e6 + 36e3 * sample_bytes**0.5)


def train_byte_level_bpe(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ()
) -> Backend:
    """Learn merges from `texts` until there are `vocab_size` ids: the end of text, `special_tokens`, 256
    bytes, merges.

    Raises UsageError where the vocabulary is too small for what must be in it, DataError where there is no
    text.
    """
    smallest = SMALLEST_BPE + len(special_tokens)
    if vocab_size < smallest:
        raise UsageError(
            f"vocab_size {vocab_size} is too small for byte-level BPE: the bytes and special tokens need {smallest} ids"
        )
    stand_in = byte_characters()
    names = [END_OF_TEXT, *special_tokens, *sorted(stand_in)]
    ids = {name: index for index, name in enumerate(names)}
    counts = count_words(texts, Words(PATTERN))
    pieces, repeated = _cut_long((word.encode("utf-8"), count) for word, count in counts.items())
    del counts
    id_of_byte = np.array([ids[character] for character in stand_in], dtype=np.int32)
    symbols = id_of_byte[np.frombuffer(b"".join(pieces), dtype=np.uint8)]
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    del pieces
    merges = learn_merges(symbols, lengths, repeated, names, vocab_size, operator.add)
    backend = Backend(models.BPE({name: index for index, name in enumerate(names)}, merges))
    backend.pre_tokenizer = byte_level_words(PATTERN)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([_special(token) for token in (END_OF_TEXT, *special_tokens)])
    return backend


def train_word_piece(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ()) -> Backend:
    """Learn word pieces from `texts`, `vocab_size` ids at most: the end of text, `[UNK]`, `special_tokens`,
    letters, pieces.

    Raises UsageError for a vocabulary of fewer than 100 ids beside the special tokens, DataError where there
    is no text.
    """
    smallest = SMALLEST_WORD_PIECE + len(special_tokens)
    if vocab_size < smallest:
        raise UsageError(
            f"vocab_size {vocab_size} is too small for WordPiece: letters and special tokens need {smallest} ids"
        )
    counts = count_words(texts, Words(BERT_WORDS))
    special = [END_OF_TEXT, UNKNOWN, *special_tokens]
    alphabet, inner = _alphabet(counts, min(_LARGEST_ALPHABET, (vocab_size - len(special)) // 2))
    names = [*special, *alphabet, *inner]
    ids = {name: index for index, name in enumerate(names)}
    pieces, repeated = _cut_long(counts.items())
    del counts
    spelled = [[ids[name] for name in _letters(piece) if name in ids] for piece in pieces]
    lengths = np.array([len(one) for one in spelled], dtype=np.int64)
    symbols = np.fromiter(itertools.chain.from_iterable(spelled), dtype=np.int32, count=int(lengths.sum()))
    del pieces, spelled
    learn_merges(
        symbols,
        lengths,
        repeated,
        names,
        vocab_size,
        lambda left, right: left + right.removeprefix(_CONTINUES),
    )
    vocabulary = {name: index for index, name in enumerate(names)}
    backend = Backend(
        models.WordPiece(
            vocabulary, unk_token=UNKNOWN, continuing_subword_prefix=_CONTINUES, max_input_chars_per_word=100
        )
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    closing = [decoders.Replace(f" {character}", character) for character in _CLOSING]
    backend.decoder = decoders.Sequence([decoders.WordPiece(prefix=_CONTINUES, cleanup=False), *closing])
    backend.add_special_tokens([_special(token) for token in special])
    return backend


def count_words(texts: Iterable[str], words: Words) -> Counter[str]:
    """How often each word occurs; raises DataError where there is none."""
    counts: Counter[str] = Counter()
    for text in texts:
        for found in words.cut(text):
            counts.update(found)
            if len(counts) > MOST_WORDS:
                counts = _without_rarest(counts)
    if not counts:
        raise DataError(
            "there is no text to train a tokenizer on; check that the input holds text and that the training share is not 0"
        )
    return counts


def _without_rarest(counts: Counter[str]) -> Counter[str]:
    rare = 0
    while len(counts) > MOST_WORDS // 2:
        rare += 1
        counts = Counter({word: count for word, count in counts.items() if count > rare})
    return counts


def _cut_long(words: Iterable[tuple[Word, int]]) -> tuple[list[Word], np.ndarray]:
    """Words of two symbols and more, none longer than LONGEST_WORD, and how often each occurred, int64; one
    symbol has no pair to merge.
    """
    pieces: list[Word] = []
    counts = array("q")
    for word, count in words:
        for start in range(0, len(word), LONGEST_WORD):
            piece = word[start : start + LONGEST_WORD] if len(word) > LONGEST_WORD else word
            if len(piece) > 1:
                pieces.append(piece)
                counts.append(count)
    return pieces, np.frombuffer(counts, dtype=np.int64)


def _letters(word: str) -> Iterator[str]:
    """The names of a word's letters in WordPiece."""
    yield word[0]
    yield from (_CONTINUES + letter for letter in word[1:])


def _alphabet(counts: Counter[str], most: int) -> tuple[list[str], list[str]]:
    """The most frequent characters, and those of them that stand inside words, with the mark of a word's
    continuation; both sorted.
    """
    letters: Counter[str] = Counter()
    inside: set[str] = set()
    for word, count in counts.items():
        for letter in word:
            letters[letter] += count
        inside.update(word[1:])
    chosen = sorted(sorted(letters), key=letters.__getitem__, reverse=True)[:most]
    return sorted(chosen), [_CONTINUES + letter for letter in sorted(inside.intersection(chosen))]


def _special(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)
