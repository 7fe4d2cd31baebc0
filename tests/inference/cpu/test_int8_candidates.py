"""The int8 candidates include the largest logits, and generated ids equal those of the full product."""

import pytest
import torch

from llm_trainer.config.schema.generation import GenerationConfig
from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.inference.cpu.int8_candidates import MAX_FRACTION, Int8Candidates, has_exact_int8_products
from llm_trainer.inference.cpu.lm_head import LMHead, TokenScores
from llm_trainer.inference.engine import LanguageModel
from llm_trainer.inference.sampling import Sampler, SamplingState
from llm_trainer.model.transformer import Transformer

needs_exact_int8 = pytest.mark.skipif(not has_exact_int8_products(), reason="this processor has no VNNI")
ROWS, WIDTH = 3000, 64


def heads() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(ROWS, WIDTH, generator=generator)
    uneven = (
        plain
        * torch.rand(ROWS, 1, generator=generator).exp()
        * torch.where(torch.arange(WIDTH) % 9 == 0, 20.0, 1.0)
    )
    with_zeros = plain.clone()
    with_zeros[::7] = 0
    twins = plain.clone()
    twins[ROWS // 2 :] = twins[: ROWS // 2]
    return {"plain": plain, "uneven": uneven, "zeros": with_zeros, "twins": twins}


@needs_exact_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", heads())
@pytest.mark.parametrize("count", [1, 20])
def test_the_largest_products_and_their_ties_are_candidates(
    kind: str, dtype: torch.dtype, count: int
) -> None:
    weight = heads()[kind].to(dtype)
    candidates = Int8Candidates(weight)
    found = 0
    for seed in range(30):
        x = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
        x[seed % WIDTH] *= 1 + seed  # one feature outweighs the others, as in trained models
        products = torch.mv(weight, x.to(dtype))
        ids = candidates(x.to(dtype), count)
        if ids is None:
            continue
        found += 1
        assert ids.tolist() == sorted(set(ids.tolist()))
        assert len(ids) <= MAX_FRACTION * ROWS
        needed = (products >= products.topk(count).values[-1]).nonzero()[:, 0]
        assert set(needed.tolist()) <= set(ids.tolist())
    assert found > 10, "otherwise nothing was tested"


@needs_exact_int8
def test_no_int8_sum_overflows() -> None:
    candidates = Int8Candidates(torch.ones(16, 4096))
    for digit in (0, 255):
        products = candidates._products(torch.full((2, 4096), digit, dtype=torch.uint8))
        torch.testing.assert_close(products, torch.full((2, 16), 4096.0 * (digit - 128)))


@needs_exact_int8
def test_equally_likely_tokens_take_the_full_product() -> None:
    weight = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)).expand(ROWS, WIDTH).contiguous()
    assert Int8Candidates(weight)(weight[0], 1) is None
    assert Int8Candidates(weight)(torch.zeros(WIDTH), 1) is None
    assert Int8Candidates(weight)(torch.full((WIDTH,), torch.nan), 1) is None


def language_model(dtype: torch.dtype) -> LanguageModel:
    shape = ModelConfig(
        model_type="llama",
        vocab_size=ROWS,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.2,
        logit_soft_cap=30.0,
    )
    return LanguageModel(Transformer(shape, torch.Generator().manual_seed(0)).to(dtype))


@needs_exact_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0}, {"temperature": 1.0, "top_k": 20, "seed": 3}, {"top_k": 9, "top_p": 0.7, "seed": 1}],
)
def test_generated_ids_are_the_same_with_and_without_candidates(
    settings: dict[str, float], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GenerationConfig(max_new_tokens=60, **settings)
    full = language_model(dtype).generate_ids([[5, 6, 7]], config)[0].ids
    counts: list[int] = []
    search = LMHead._search

    def counting(self: LMHead, *arguments: torch.Tensor) -> torch.Tensor | None:
        ids = search(self, *arguments)
        if ids is not None:
            counts.append(len(ids))
        return ids

    monkeypatch.setattr(LMHead, "_search", counting)
    monkeypatch.setattr("llm_trainer.inference.cpu.lm_head.TOKENS_BEFORE_CANDIDATES", 0)
    monkeypatch.setattr("llm_trainer.inference.cpu.int8_candidates.MIN_WEIGHTS", 0)
    assert language_model(dtype).generate_ids([[5, 6, 7]], config)[0].ids == full
    assert len(counts) > 20, "otherwise the candidates were hardly used"


@needs_exact_int8
def test_rows_beyond_the_vocabulary_are_no_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_trainer.inference.cpu.lm_head.TOKENS_BEFORE_CANDIDATES", 0)
    monkeypatch.setattr("llm_trainer.inference.cpu.int8_candidates.MIN_WEIGHTS", 0)
    model = language_model(torch.float32).model
    hidden = model.lm_head.weight[2900:2901].detach()  # most similar to a row beyond the vocabulary
    with torch.inference_mode():
        scores = LMHead(model, 2500)(hidden, 1)
        expected = model.logits(hidden)[:, :2500]
    assert scores.ids is not None
    assert int(scores.ids[scores.logits.argmax()]) == int(expected.argmax())
    torch.testing.assert_close(scores.logits, expected[:, scores.ids])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 0}, 1),
        ({"top_k": 7}, 7),
        ({"top_k": 7, "top_p": 0.5, "min_p": 0.1}, 7),
        ({"top_p": 0.5}, None),
        ({"temperature": 0, "repetition_penalty": 1.2}, None),
    ],
)
def test_the_sampler_reports_how_many_candidates_decide(
    settings: dict[str, float], expected: int | None
) -> None:
    assert Sampler([SamplingState(GenerationConfig(**settings))], 50).num_candidates == expected


def test_drawing_from_the_candidates_alone_draws_the_same() -> None:
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(0))
    ids = logits[0].topk(30).indices.sort().values
    for seed in range(20):
        settings = GenerationConfig(top_k=25, temperature=1.5, seed=seed)
        full = Sampler([SamplingState(settings)], 500)(*TokenScores(logits))
        part = Sampler([SamplingState(settings)], 500)(*TokenScores(logits[:, ids], ids))
        assert torch.equal(full, part)


@needs_exact_int8
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_goes_to_the_full_product(bad: float) -> None:
    weight = heads()["plain"]
    weight[5, 3] = bad
    assert Int8Candidates(weight)(torch.ones(WIDTH), 1) is None
