"""LLM_TRAINER_FAST_TOKENIZER=0 encodes and trains with the `tokenizers` library, with the same result."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_trainer.config.environment import use_fast_tokenizer
from llm_trainer.data.tokenization import vocab_training
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.errors import DataError, UsageError

SWITCH = "LLM_TRAINER_FAST_TOKENIZER"


def train(kind: str, texts: list[str], vocab_size: int, *, fast: bool) -> Tokenizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "1" if fast else "0")
        return Tokenizer.train(kind, texts, vocab_size, ["<|user|>"])


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_both_ways_train_the_same_tokenizer_and_encode_the_same_ids(
    monkeypatch: pytest.MonkeyPatch, tiny_texts: list[str], kind: str
) -> None:
    texts = [
        *tiny_texts,
        "naïve “text” — Größe, 日本語, Привет 🙂\n" * 20,
        "A" * 5000 + " <|user|> <|endoftext|>",
        "\U0001fac6 uncertain \u017f characters " * 10,
    ]
    fast = train(kind, texts, 900, fast=True)
    plain = train(kind, texts, 900, fast=False)
    assert fast.hash == plain.hash
    assert fast._bulk_encoder is not None
    fast_ids = fast.encode_batch(texts)
    monkeypatch.setenv(SWITCH, "0")
    assert plain._bulk_encoder is None
    assert plain.encode_batch(texts) == fast_ids


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
@settings(max_examples=60)
@given(
    texts=st.lists(st.text(st.sampled_from("aaabbbc \n.1é日"), max_size=120), min_size=1, max_size=10).filter(
        lambda texts: any(text.strip() for text in texts)
    ),
    vocab_size=st.sampled_from([260, 280, 400]),
)
def test_both_ways_train_the_same_vocabulary_on_any_text(
    kind: str, texts: list[str], vocab_size: int
) -> None:
    assert train(kind, texts, vocab_size, fast=True).hash == train(kind, texts, vocab_size, fast=False).hash


def test_both_ways_train_the_same_wordpieces_with_a_large_alphabet() -> None:
    text = " ".join(chr(0x4E00 + number % 3000) + "the" for number in range(9000)) + " the then them " * 500
    assert train("wordpiece", [text], 300, fast=True).hash == train("wordpiece", [text], 300, fast=False).hash


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_without_text_both_ways_raise_the_same_error(kind: str) -> None:
    for fast in (True, False):
        with pytest.raises(DataError, match="no text"):
            train(kind, [""], 300, fast=fast)


def test_the_switch_is_on_by_default_and_takes_0_or_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    assert use_fast_tokenizer()
    monkeypatch.setenv(SWITCH, "0")
    assert not use_fast_tokenizer()
    monkeypatch.setenv(SWITCH, "no")
    with pytest.raises(UsageError, match="LLM_TRAINER_FAST_TOKENIZER='no' must be 0 or 1"):
        use_fast_tokenizer()


def test_with_the_switch_off_no_fast_code_runs(
    monkeypatch: pytest.MonkeyPatch, tiny_texts: list[str]
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the fast path was used")

    monkeypatch.setenv(SWITCH, "0")
    for name in ("learn_bpe_merges", "RegexPreTokenizer"):
        monkeypatch.setattr(vocab_training, name, fail)
    for kind in ("bpe", "wordpiece"):
        tokenizer = Tokenizer.train(kind, tiny_texts, 400)
        assert tokenizer.encode(tiny_texts[0])
        assert "_bulk_encoder" not in vars(tokenizer) or tokenizer._bulk_encoder is None
