"""Trains the vocabularies of byte-level BPE and WordPiece tokenizers.

Byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; bytes as in GPT-2) can encode any text. Its words are
split by the pattern of Llama 3 and GPT-4, which other engines know by name, not by a new one, so that
exported tokenizers work alike everywhere. WordPiece (Schuster & Nakajima 2012) is BERT's, with case; decoding
does not restore whitespace and unknown characters.

The `tokenizers` library could train both. Here `fast/pretokenizer.py` splits the words, they are counted
while they are read, and `fast/bpe_trainer.py` merges their symbols. The vocabulary and merges are the same
(tests compare them), in 0.8 of the time and 0.7 of the memory on 100 MB of text
(`benchmarks/bpe_training.py`). LLM_TRAINER_FAST_TOKENIZER=0 trains with the library instead. Two limits bound
the memory whatever the text is:

* Words are cut at `MAX_WORD_LENGTH`, in both ways of training: a run without a boundary (a line of base64, a
  genome) would otherwise be one word of any length.
* At most `MAX_DISTINCT_WORDS` distinct words are counted, in the fast way alone: beyond that the rarest are
  dropped. Text of 100 MB has about half of them.
"""

from __future__ import annotations

import itertools
import json
import operator
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from llm_trainer.config.environment import use_fast_tokenizer
from llm_trainer.data.tokenization.fast.bpe_trainer import learn_bpe_merges
from llm_trainer.data.tokenization.fast.pretokenizer import BERT_PATTERN, DEFAULT_PATTERN, RegexPreTokenizer
from llm_trainer.data.tokenization.tokenizer_json import (
    END_OF_TEXT,
    UNKNOWN,
    byte_level_pre_tokenizer,
    bytes_to_unicode,
)
from llm_trainer.errors import DataError, UsageError

MIN_BPE_VOCAB_SIZE = 257  # every byte, and the end of text
MIN_WORDPIECE_VOCAB_SIZE = 100
MAX_WORD_LENGTH = 256  # bytes for BPE, characters for WordPiece
MAX_DISTINCT_WORDS = 2**21
_MAX_ALPHABET = 1000  # characters of WordPiece, as in BERT's trainers
_CONTINUATION = "##"
_CLOSING_PUNCTUATION = ".,!?;:)"
_NO_TEXT = (
    "there is no text to train a tokenizer on; check that the input contains text"
    " and that train_ratio is not 0"
)
Word = TypeVar("Word", str, bytes)


@dataclass(frozen=True)
class TrainingEstimate:
    """About what it takes to train a vocabulary.

    Attributes:
        seconds: Time.
        memory_bytes: Memory in addition to what the process uses already.
    """

    seconds: float
    memory_bytes: float

    def __str__(self) -> str:
        return f"about {self.seconds:.0f} s and {self.memory_bytes / 1e6:.0f} MB of memory"


def estimate_training(sample_bytes: float) -> TrainingEstimate:
    """Estimate the training on this many bytes of text on one core of 2024; repeated text takes less.

    The formula was fitted to measurements at 10 to 100 MB. Time is proportional to the text; the number of
    distinct words, which decides the memory, grows more slowly (Heaps' law).
    """
    return TrainingEstimate(2 + sample_bytes / 7e6, 30e6 + 36e3 * sample_bytes**0.5)


def train_byte_level_bpe(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ()
) -> Backend:
    """Train a byte-level BPE tokenizer: the end of text, `special_tokens`, 256 bytes, then merges.

    Args:
        texts: The training text, read once.
        vocab_size: Number of ids, if there are enough pairs to merge.
        special_tokens: Names that get an id of their own.

    Raises:
        DataError: There is no text.
        UsageError: The vocabulary is too small for the bytes and the special tokens.
    """
    min_size = MIN_BPE_VOCAB_SIZE + len(special_tokens)
    if vocab_size < min_size:
        raise UsageError(
            f"vocab_size {vocab_size} is too small for byte-level BPE: the bytes and special tokens need"
            f" {min_size} ids; raise vocab_size"
        )
    special = [END_OF_TEXT, *special_tokens]
    train = _train_bpe_fast if use_fast_tokenizer() else _train_bpe_with_library
    names, merges = train(texts, vocab_size, special)
    backend = Backend(models.BPE({name: index for index, name in enumerate(names)}, merges))
    backend.pre_tokenizer = byte_level_pre_tokenizer(DEFAULT_PATTERN)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([_special(token) for token in special])
    return backend


def train_wordpiece(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ()) -> Backend:
    """Train a WordPiece tokenizer: the end of text, `[UNK]`, `special_tokens`, letters, then pieces.

    Args:
        texts: The training text, read once.
        vocab_size: Number of ids, if there are enough pairs to merge.
        special_tokens: Names that get an id of their own.

    Raises:
        DataError: There is no text.
        UsageError: The vocabulary has fewer than 100 ids in addition to the special tokens.
    """
    min_size = MIN_WORDPIECE_VOCAB_SIZE + len(special_tokens)
    if vocab_size < min_size:
        raise UsageError(
            f"vocab_size {vocab_size} is too small for WordPiece: letters and special tokens need {min_size}"
            " ids; raise vocab_size"
        )
    special = [END_OF_TEXT, UNKNOWN, *special_tokens]
    is_fast = use_fast_tokenizer()
    counts = count_words(texts, RegexPreTokenizer(BERT_PATTERN)) if is_fast else _count_with_library(texts)
    alphabet, inner = _alphabet(counts, min(_MAX_ALPHABET, (vocab_size - len(special)) // 2))
    train = _train_wordpiece_fast if is_fast else _train_wordpiece_with_library
    names = train(counts, vocab_size, [*special, *alphabet, *inner], alphabet)
    backend = Backend(
        models.WordPiece(
            {name: index for index, name in enumerate(names)},
            unk_token=UNKNOWN,
            continuing_subword_prefix=_CONTINUATION,
            max_input_chars_per_word=100,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    closing = [decoders.Replace(f" {character}", character) for character in _CLOSING_PUNCTUATION]
    backend.decoder = decoders.Sequence([decoders.WordPiece(prefix=_CONTINUATION, cleanup=False), *closing])
    backend.add_special_tokens([_special(token) for token in special])
    return backend


def count_words(texts: Iterable[str], pre_tokenizer: RegexPreTokenizer) -> Counter[str]:
    """Count how often each word occurs.

    Args:
        texts: The text, read once.
        pre_tokenizer: Splits it into words.

    Raises:
        DataError: There are no words.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        for words in pre_tokenizer.split(text):
            counts.update(words)
            if len(counts) > MAX_DISTINCT_WORDS:
                counts = _without_rarest(counts)
    if not counts:
        raise DataError(_NO_TEXT)
    return counts


def _without_rarest(counts: Counter[str]) -> Counter[str]:
    rare = 0
    while len(counts) > MAX_DISTINCT_WORDS // 2:
        rare += 1
        counts = Counter({word: count for word, count in counts.items() if count > rare})
    return counts


def _train_bpe_fast(
    texts: Iterable[str], vocab_size: int, special: Sequence[str]
) -> tuple[list[str], list[tuple[str, str]]]:
    """The names of all ids, and the merges."""
    characters = bytes_to_unicode()
    names = [*special, *sorted(characters)]
    ids = {name: index for index, name in enumerate(names)}
    counts = count_words(texts, RegexPreTokenizer(DEFAULT_PATTERN))
    words, word_counts = _cut_long((word.encode("utf-8"), count) for word, count in counts.items())
    del counts
    id_of_byte = np.array([ids[character] for character in characters], dtype=np.int32)
    symbols = id_of_byte[np.frombuffer(b"".join(words), dtype=np.uint8)]
    lengths = np.array([len(word) for word in words], dtype=np.int64)
    del words
    return names, learn_bpe_merges(symbols, lengths, word_counts, names, vocab_size, operator.add)


def _train_bpe_with_library(
    texts: Iterable[str], vocab_size: int, special: Sequence[str]
) -> tuple[list[str], list[tuple[str, str]]]:
    """The same by the `tokenizers` library."""
    is_empty = True

    def checked() -> Iterator[str]:
        nonlocal is_empty
        for text in texts:
            is_empty &= not text
            yield text

    backend = Backend(models.BPE())
    cut_long = pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{MAX_WORD_LENGTH}}}"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([byte_level_pre_tokenizer(DEFAULT_PATTERN), cut_long])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_special(token) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(checked(), trainer)
    if is_empty:
        raise DataError(_NO_TEXT)
    model = json.loads(backend.to_str())["model"]
    return _by_id(model["vocab"]), [(left, right) for left, right in model["merges"]]


def _train_wordpiece_fast(
    counts: Counter[str], vocab_size: int, names: list[str], alphabet: list[str]
) -> list[str]:
    """The names of all ids; those given are the first, and contain the letters of the alphabet."""
    ids = {name: index for index, name in enumerate(names)}
    words, word_counts = _cut_long(counts.items())
    spelled = [[ids[name] for name in _letters(word) if name in ids] for word in words]
    lengths = np.array([len(one) for one in spelled], dtype=np.int64)
    symbols = np.fromiter(itertools.chain.from_iterable(spelled), dtype=np.int32, count=int(lengths.sum()))
    del words, spelled
    learn_bpe_merges(
        symbols,
        lengths,
        word_counts,
        names,
        vocab_size,
        lambda left, right: left + right.removeprefix(_CONTINUATION),
    )
    return names


def _train_wordpiece_with_library(
    counts: Counter[str], vocab_size: int, names: list[str], alphabet: list[str]
) -> list[str]:
    """The same by the `tokenizers` library.

    The library numbers letters in the random order of a hash table; they are passed to it as special tokens,
    so that they have fixed ids.
    """
    words, word_counts = _cut_long(counts.items())
    backend = Backend(models.WordPiece(unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=names,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix=_CONTINUATION,
        show_progress=False,
    )
    repeated = (" ".join([word] * count) for word, count in zip(words, word_counts.tolist(), strict=True))
    backend.train_from_iterator(repeated, trainer)
    return _by_id(backend.get_vocab())


def _count_with_library(texts: Iterable[str]) -> Counter[str]:
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in pre_tokenizer.pre_tokenize_str(text))
    if not counts:
        raise DataError(_NO_TEXT)
    return counts


def _by_id(vocabulary: dict[str, int]) -> list[str]:
    return sorted(vocabulary, key=vocabulary.__getitem__)


def _cut_long(words: Iterable[tuple[Word, int]]) -> tuple[list[Word], np.ndarray]:
    """Words of at least two symbols, cut at `MAX_WORD_LENGTH`, and how often each occurred, int64.

    A single symbol has no pair to merge. Equal parts of long words are one word: a run of one letter, however
    long, is two.
    """
    parts: list[Word] = []
    counts = array("q")
    of_long_words: Counter[Word] = Counter()
    for word, count in words:
        if len(word) > MAX_WORD_LENGTH:
            for start in range(0, len(word), MAX_WORD_LENGTH):
                of_long_words[word[start : start + MAX_WORD_LENGTH]] += count
        elif len(word) > 1:
            parts.append(word)
            counts.append(count)
    for part, count in of_long_words.items():
        if len(part) > 1:
            parts.append(part)
            counts.append(count)
    return parts, np.frombuffer(counts, dtype=np.int64)


def _letters(word: str) -> Iterator[str]:
    """The names of a word's letters in WordPiece."""
    yield word[0]
    yield from (_CONTINUATION + letter for letter in word[1:])


def _alphabet(counts: Counter[str], max_letters: int) -> tuple[list[str], list[str]]:
    """The most frequent characters, and those of them inside words with the prefix `##`, sorted."""
    letters: Counter[str] = Counter()
    inside: set[str] = set()
    for word, count in counts.items():
        for letter in word:
            letters[letter] += count
        inside.update(word[1:])
    chosen = sorted(sorted(letters), key=letters.__getitem__, reverse=True)[:max_letters]
    return sorted(chosen), [_CONTINUATION + letter for letter in sorted(inside.intersection(chosen))]


def _special(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)
