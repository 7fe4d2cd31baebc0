"""Training on counted words gives the vocabulary of the tokenizers library, in bounded memory."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from llm_trainer.data.tokenization import vocab_training
from llm_trainer.data.tokenization.fast import bpe_trainer
from llm_trainer.data.tokenization.fast.pretokenizer import BERT_PATTERN, DEFAULT_PATTERN, RegexPreTokenizer
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.data.tokenization.tokenizer_json import END_OF_TEXT, byte_level_pre_tokenizer
from llm_trainer.data.tokenization.vocab_training import count_words, estimate_training
from llm_trainer.errors import DataError, UsageError


def train_with_library(texts: list[str], vocab_size: int) -> Backend:
    """Train as in the library's documentation."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = byte_level_pre_tokenizer(DEFAULT_PATTERN)
    special = [AddedToken(END_OF_TEXT, special=True, normalized=False)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return backend


def test_bpe_has_the_ids_and_merges_of_the_library(tiny_texts: list[str]) -> None:
    texts = [
        *tiny_texts,
        "naïve “text” — Größe, 日本語, Привет 🙂\n" * 20,
        "\U0001fac6 uncertain \u017f characters " * 10,
    ]
    for vocab_size in (300, 1500):
        assert (
            Tokenizer.train("bpe", texts, vocab_size)._backend.get_vocab()
            == train_with_library(texts, vocab_size).get_vocab()
        )
    ours, plain = Tokenizer.train("bpe", texts, 1500), train_with_library(texts, 1500)
    assert all(ours.encode(text) == plain.encode(text).ids for text in texts)


@settings(max_examples=150)
@given(
    texts=st.lists(st.text(st.sampled_from("aaabbbc \n.1é"), max_size=120), min_size=1, max_size=10).filter(
        any
    ),
    vocab_size=st.sampled_from([260, 280, 400]),
    lower_by=st.sampled_from([2, 8]),
)
def test_merges_of_any_text_are_those_of_the_library(
    texts: list[str], vocab_size: int, lower_by: int
) -> None:
    """Few letters, so that runs, overlaps, ties and tokens that two pairs make are frequent."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe_trainer, "_FLOOR_DIVISOR", lower_by)
        ours = json.loads(Tokenizer.train("bpe", texts, vocab_size).to_json())["model"]
    plain = json.loads(train_with_library(texts, vocab_size).to_str())["model"]
    assert ours["vocab"] == plain["vocab"]
    assert ours["merges"] == plain["merges"]


def test_nearly_all_wordpieces_are_those_of_the_library(tiny_texts: list[str]) -> None:
    """The library numbers letters randomly, so ties between equal counts may be decided differently."""
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=600, special_tokens=[END_OF_TEXT, "[UNK]"], show_progress=False
    )
    backend.train_from_iterator(tiny_texts, trainer)
    ours = Tokenizer.train("wordpiece", tiny_texts, 600)._backend.get_vocab().keys()
    assert len(ours ^ backend.get_vocab().keys()) < 30


def test_a_word_that_occurs_often_outweighs_one_that_is_long() -> None:
    assert Tokenizer.train("bpe", ["xy " * 1000 + "ab" * 100], 258).encode("xy") == [257]


@pytest.mark.parametrize("pattern", [DEFAULT_PATTERN, BERT_PATTERN])
def test_words_are_counted_as_the_library_splits_them(tiny_texts: list[str], pattern: str) -> None:
    cutter = pre_tokenizers.BertPreTokenizer() if pattern == BERT_PATTERN else None
    counts: Counter[str] = Counter()
    for text in tiny_texts:
        counts.update(
            [word for word, _ in cutter.pre_tokenize_str(text)]
            if cutter
            else [w for found in RegexPreTokenizer(pattern).split(text) for w in found]
        )
    assert count_words(tiny_texts, RegexPreTokenizer(pattern)) == counts


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_training_is_deterministic(tiny_texts: list[str], kind: str) -> None:
    assert Tokenizer.train(kind, tiny_texts, 400).hash == Tokenizer.train(kind, tiny_texts[::-1], 400).hash


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_a_vocabulary_has_the_requested_size_and_begins_with_special_tokens(
    tiny_texts: list[str], kind: str
) -> None:
    tokenizer = Tokenizer.train(kind, tiny_texts, 400, ["<|user|>", "<|assistant|>"])
    assert tokenizer.vocab_size == 400
    assert tokenizer.eos_id == 0
    first = 1 if kind == "bpe" else 2
    assert [tokenizer.token_to_id("<|user|>"), tokenizer.token_to_id("<|assistant|>")] == [first, first + 1]
    assert first not in tokenizer.encode("a <|user|> b")
    assert first in tokenizer.encode("a <|user|> b", allow_special=True)


def test_a_character_tokenizer_numbers_special_tokens_last() -> None:
    tokenizer = Tokenizer.train("char", ["abc"], 0, ["<|endoftext|>", "<|user|>"])
    assert tokenizer.is_character_level
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.token_to_id("<|user|>")) == (5, 3, 4)
    assert tokenizer.encode("cab") == [2, 0, 1]
    assert tokenizer.encode("c<|user|>", allow_special=True) == [2, 4]
    with pytest.raises(DataError, match="'<'"):
        tokenizer.encode("<|user|>")


def test_special_tokens_are_added_to_an_existing_tokenizer(
    tmp_path: Path, tiny_tokenizer: Tokenizer, tiny_text: str
) -> None:
    more = tiny_tokenizer.with_special_tokens(["<|user|>", END_OF_TEXT])
    assert (more.vocab_size, more.token_to_id("<|user|>"), more.eos_id) == (301, 300, tiny_tokenizer.eos_id)
    assert more.encode(tiny_text) == tiny_tokenizer.encode(tiny_text)
    assert more.hash != tiny_tokenizer.hash
    more.save(tmp_path)
    assert Tokenizer.load(tmp_path).hash == more.hash
    assert tiny_tokenizer.with_special_tokens([END_OF_TEXT]) is tiny_tokenizer


def test_transformers_opens_a_wordpiece_tokenizer_with_equal_ids(
    tmp_path: Path, tiny_texts: list[str]
) -> None:
    ours = Tokenizer.train("wordpiece", tiny_texts, 500)
    ours.save(tmp_path)
    theirs, again = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    assert (again.hash, again.kind) == (ours.hash, "wordpiece")
    for text in (*tiny_texts, "Unknown: 日本 and <|endoftext|> and [UNK]"):
        assert theirs(text, split_special_tokens=True)["input_ids"] == ours.encode(text) == again.encode(text)
        assert theirs.decode(ours.encode(text), skip_special_tokens=True) == ours.decode(ours.encode(text))
    assert (theirs.eos_token_id, theirs.unk_token_id) == (ours.eos_id, 1)


def test_wordpieces_decode_to_the_words_but_not_the_whitespace(tiny_texts: list[str]) -> None:
    """The documented limits: whitespace, unknown characters, words of more than 100 characters."""
    tokenizer = Tokenizer.train("wordpiece", tiny_texts, 500)
    text = "The value of a name, and\n\n   then another."
    assert tokenizer.decode(tokenizer.encode(text)) == "The value of a name, and then another."
    for text in tiny_texts:
        back = tokenizer.decode(tokenizer.encode(text))
        assert back.replace(" ", "") == "".join(text.split())
    unknown = tokenizer.token_to_id("[UNK]")
    assert tokenizer.encode("日") == [unknown]
    assert tokenizer.encode("a" * 101) == [unknown] != tokenizer.encode("a" * 100)


def test_a_rare_alphabet_leaves_room_for_pieces() -> None:
    text = " ".join(chr(0x4E00 + number % 3000) for number in range(9000)) + " the then them " * 500
    tokenizer = Tokenizer.train("wordpiece", [text], 200)
    assert tokenizer.vocab_size <= 200
    assert tokenizer.encode("the") == [tokenizer.token_to_id("the")]


def test_the_number_of_counted_words_is_bounded_and_frequent_words_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vocab_training, "MAX_DISTINCT_WORDS", 100)
    texts = [f"the word{chr(97 + i % 26)}{chr(97 + i // 26 % 26)} of" for i in range(600)]
    counts = count_words(texts, RegexPreTokenizer(DEFAULT_PATTERN))
    assert len(counts) <= 100
    assert (counts["the"], counts[" of"]) == (600, 600)


def test_a_long_word_is_cut_for_training_only() -> None:
    run = "A" * 10_000
    tokenizer = Tokenizer.train("bpe", [run * 3, "some words"], 400)
    assert (
        max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size))
        <= vocab_training.MAX_WORD_LENGTH
    )
    assert tokenizer.decode(tokenizer.encode(run)) == run


@pytest.mark.parametrize("run", ["a" * 100_003, "ab" * 50_001])
def test_a_long_run_is_learned_as_the_library_learns_it_from_few_symbols(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def learn(symbols: np.ndarray, *others: Any) -> list[tuple[str, str]]:
        sizes.append(len(symbols))
        return bpe_trainer.learn_bpe_merges(symbols, *others)

    monkeypatch.setattr(vocab_training, "learn_bpe_merges", learn)
    ours = json.loads(Tokenizer.train("bpe", [run], 400).to_json())["model"]
    assert sizes[0] <= 2 * vocab_training.MAX_WORD_LENGTH
    monkeypatch.setenv("LLM_TRAINER_FAST_TOKENIZER", "0")
    plain = json.loads(Tokenizer.train("bpe", [run], 400).to_json())["model"]
    assert ours["merges"] == plain["merges"]


def test_a_vocabulary_that_is_too_small_and_missing_text_are_refused() -> None:
    for kind, vocab_size, least in (("bpe", 256, "257"), ("wordpiece", 99, "100")):
        with pytest.raises(UsageError, match=least):
            Tokenizer.train(kind, ["text"], vocab_size)
    for kind in ("bpe", "wordpiece", "char"):
        with pytest.raises(DataError, match="no text"):
            Tokenizer.train(kind, [], 300)
    with pytest.raises(DataError, match="no text"):
        Tokenizer.train("char", [""], 300)


def test_the_estimate_grows_with_the_text_and_prints_time_and_memory() -> None:
    small, large = estimate_training(1e6), estimate_training(1e8)
    assert small.seconds < large.seconds
    assert small.memory_bytes < large.memory_bytes
    assert str(large) == f"about {large.seconds:.0f} s and {large.memory_bytes / 1e6:.0f} MB of memory"
