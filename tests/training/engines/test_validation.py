"""Validation covers every window once and gives the same result at every batch size."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_run import CONTEXT, SHAPE, VOCABULARY, tiny_model, tiny_trainer, tokens

from llm_trainer.config import DataError, ModelConfig
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.engines.validation import validate
from llm_trainer.training.objectives.objective import LossSum

MODEL = ModelConfig(**SHAPE)


@pytest.mark.parametrize("windows", [1, 7, 8, 23])
def test_the_loss_does_not_depend_on_the_batch_size(windows: int) -> None:
    model, data = tiny_model(MODEL), tokens(windows * CONTEXT + 3)
    results = [validate(model, data, CONTEXT, batch_size) for batch_size in (1, 3, 8)]
    assert {result.tokens for result in results} == {
        windows * CONTEXT + 2
    }  # the last part is shorter than a window
    for result in results[1:]:
        assert result.loss == pytest.approx(results[0].loss, abs=1e-6)


def test_it_is_the_mean_loss_of_each_window_alone() -> None:
    model, data = tiny_model(MODEL).eval(), tokens(9 * CONTEXT + 1)
    losses = []
    for start in range(0, 9 * CONTEXT, CONTEXT):
        ids = torch.from_numpy(np.asarray(data.read(start, CONTEXT + 1)))
        with torch.no_grad():
            losses.append(F.cross_entropy(model(ids[None, :-1])[0], ids[1:]).item())
    result = validate(model, data, CONTEXT, 4)
    assert result.loss == pytest.approx(sum(losses) / 9, abs=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.bits_per_byte is None


def test_bits_per_byte_spread_the_loss_over_the_texts_bytes() -> None:
    ids = tokens(9 * CONTEXT + 1).read(0, 9 * CONTEXT + 1).astype(np.uint16)
    data = TokenDataset(
        [ids],
        [np.array([0])],
        vocab_size=VOCABULARY,
        tokenizer_hash="0" * 64,
        fingerprint="x",
        num_bytes=4 * len(ids),
    )
    result = validate(tiny_model(MODEL), data, CONTEXT, 4)
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2) / 4)


def test_the_model_is_evaluated_without_dropout_and_trains_on_afterwards() -> None:
    model = tiny_model(ModelConfig(**SHAPE | {"dropout": 0.5})).train()
    first, second = (validate(model, tokens(), CONTEXT, 8).loss for _ in range(2))
    assert first == second
    assert model.training


def test_nothing_of_a_batch_is_kept_but_scalars() -> None:
    model, kept = tiny_model(MODEL), []

    def objective(model: Transformer, batch: object) -> LossSum:
        logits = model(batch.input_ids)  # type: ignore[attr-defined]
        assert not logits.requires_grad
        kept.append(logits.untyped_storage()._weak_ref())  # type: ignore[attr-defined]
        return LossSum(logits.sum(), torch.tensor(1))

    seen: list[int] = []
    validate(model, tokens(), CONTEXT, 8, objective=objective, on_batch=seen.append)
    assert seen == [1, 2, 3, 4, 5]
    assert all(torch.UntypedStorage._expired(reference) for reference in kept)  # type: ignore[attr-defined]


def test_a_limit_is_spread_over_the_split() -> None:
    model, data = tiny_model(MODEL), tokens()
    assert validate(model, data, CONTEXT, 4, limit=2).tokens == 2 * 4 * CONTEXT


def test_a_split_with_nothing_to_predict_is_refused() -> None:
    with pytest.raises(DataError, match="validation split"):
        validate(tiny_model(MODEL), tokens(1), CONTEXT, 4)


def test_a_loss_too_large_for_a_perplexity_is_infinite_and_no_error(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    result = validate(
        trainer.model,
        tokens(),
        CONTEXT,
        4,
        objective=lambda model, batch: LossSum(torch.tensor(1e4), torch.tensor(1)),
    )
    assert (result.loss, result.perplexity) == (1e4, math.inf)
