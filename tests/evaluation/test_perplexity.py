"""Perplexity scores each token once, and agrees with its definition and with validation in training."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.errors import DataError, NotFiniteError, UsageError
from llm_trainer.evaluation.perplexity import (
    evaluate_source,
    evaluate_text,
    read_text,
    scoring_windows,
    sum_token_losses,
)
from llm_trainer.inference.engine import LanguageModel
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.engines.validation import validate

TEXT = "The quick brown fox jumps over the lazy dog. Größe, café, 東京 🙂. " * 6
CONTEXT = 16


def model_for(tokenizer: Tokenizer) -> LanguageModel:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
    config = ModelConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=CONTEXT, **shape)
    return LanguageModel(Transformer(config, torch.Generator().manual_seed(0)), tokenizer)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return model_for(Tokenizer.train_bpe([TEXT], 280))


@torch.inference_mode()
def loss_by_definition(model: LanguageModel, ids: list[int], stride: int) -> float:
    """The sum of losses token by token, each from the window that scores it."""
    total, scored = 0.0, 0
    for start in range(0, len(ids) - 1, stride):
        end = min(start + CONTEXT, len(ids) - 1)
        predictions = model.model(torch.tensor([ids[start:end]]))[0].log_softmax(-1)
        total -= sum(
            float(predictions[position - start, ids[position + 1]]) for position in range(scored, end)
        )
        scored = end
        if end == len(ids) - 1:
            break
    return total


@pytest.mark.parametrize("stride", [None, 16, 5, 1])
def test_every_token_is_scored_once_from_its_window(model: LanguageModel, stride: int | None) -> None:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode(TEXT)
    result = evaluate_text(model, TEXT, stride=stride)
    total = loss_by_definition(model, [tokenizer.bos_id, *ids], stride or CONTEXT)
    assert result.tokens == len(ids)
    assert result.loss == pytest.approx(total / len(ids), abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / len(TEXT.encode()), rel=1e-5)


@given(num_predicted=st.integers(1, 200), context=st.integers(1, 40), fraction=st.floats(0, 1))
def test_windows_score_each_token_once_with_enough_context(
    num_predicted: int, context: int, fraction: float
) -> None:
    stride = max(1, round(context * fraction))
    scored: list[int] = []
    for window in scoring_windows(num_predicted, context, stride):
        assert 0 < window.end - window.start <= context
        assert window.start == 0 or window.scored_from - window.start >= context - stride
        scored += range(window.scored_from, window.end)
    assert scored == list(range(num_predicted))


@pytest.mark.parametrize("stride", [None, 7])
def test_the_batch_size_does_not_change_the_result(model: LanguageModel, stride: int | None) -> None:
    results = [evaluate_text(model, TEXT, batch_size=size, stride=stride) for size in (1, 3, 8)]
    assert len({result.tokens for result in results}) == 1
    for result in results[1:]:
        assert result.loss == pytest.approx(results[0].loss, abs=1e-6)


@pytest.mark.parametrize("documents", [[0], [0, 10, 40, 41]])
@pytest.mark.parametrize("eos_id", [None, 7])
@pytest.mark.parametrize("rest", [0, 5])
def test_the_loss_equals_that_of_validation_in_training(
    model: LanguageModel, documents: list[int], eos_id: int | None, rest: int
) -> None:
    ids = np.random.default_rng(0).integers(0, 250, 4 * CONTEXT + 1 + rest)
    stream = {"vocab_size": 280, "tokenizer_hash": "0" * 64, "fingerprint": "f", "eos_id": eos_id}
    tokens = TokenDataset([ids], [np.array(documents)], **stream)
    total, count = sum_token_losses(model.model, tokens, CONTEXT, 3)
    expected = validate(model.model, tokens, CONTEXT, 2)
    assert count == expected.tokens
    assert total / count == pytest.approx(expected.loss, abs=1e-5)


def test_without_a_beginning_of_sequence_token_the_first_character_is_not_scored() -> None:
    model = model_for(Tokenizer.from_characters([TEXT]))
    result = evaluate_text(model, "é" + "dog fox " * 5)
    assert result.tokens == 40
    assert result.bits_per_byte == pytest.approx(result.loss * 40 / math.log(2) / 40, rel=1e-6), (
        "é is two bytes, and it is not scored"
    )


def test_errors_name_files_without_text(model: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    for name in ("empty.txt", "latin.txt", "missing.txt"):
        with pytest.raises(DataError, match=name):
            evaluate_source(model, tmp_path / name)
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert read_text(tmp_path / "bom.txt") == "abc"


def test_a_stride_above_the_context_is_refused(model: LanguageModel) -> None:
    for stride in (0, CONTEXT + 1):
        with pytest.raises(UsageError, match=f"invalid stride: {stride} "):
            evaluate_text(model, TEXT, stride=stride)


def test_a_model_with_damaged_weights_has_no_perplexity(tmp_path: Path) -> None:
    model = model_for(Tokenizer.train_bpe([TEXT], 280))
    model.model.wte.weight.data[-1] = torch.nan
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(NotFiniteError):
        evaluate_source(model, tmp_path / "text.txt")
