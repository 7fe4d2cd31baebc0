"""Restrictions equal those of transformers, and each row draws by its own settings and seed alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from llm_trainer.config.schema.generation import GenerationConfig
from llm_trainer.errors import NotFiniteError, UsageError
from llm_trainer.inference.sampling import Sampler, SamplingState, draw, keep_min_p, keep_top_k, keep_top_p

VOCAB = 97


def logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def sampler(
    *settings: GenerationConfig, prompts: list[list[int]] | None = None, vocab: int = VOCAB
) -> Sampler:
    prompts = prompts or [[] for _ in settings]
    return Sampler(
        [SamplingState(each, prompt) for each, prompt in zip(settings, prompts, strict=True)], vocab
    )


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [None, 1, 5, VOCAB, 10_000])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.9, 1.0])
@pytest.mark.parametrize("min_p", [None, 0.0, 0.1])
def test_restriction_equals_transformers_warpers(
    temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    warpers = pytest.importorskip("transformers.generation.logits_process")
    expected = warpers.TemperatureLogitsWarper(temperature)(None, logits(4))
    if top_k is not None:
        expected = warpers.TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None:
        expected = warpers.TopPLogitsWarper(top_p)(None, expected)
    if min_p is not None:
        expected = warpers.MinPLogitsWarper(min_p)(None, expected)
    each = GenerationConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ours = sampler(*[each] * 4)
    torch.testing.assert_close(ours.restrict(logits(4) / ours.temperature), expected)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    prompts = [[1, 2, 3], [5, 5, 5]]
    expected = processors.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(prompts), logits(2)).argmax(
        -1
    )
    each = GenerationConfig(temperature=0, repetition_penalty=penalty)
    assert torch.equal(sampler(each, each, prompts=prompts)(logits(2)), expected)


def test_repetition_penalty_remembers_what_was_drawn() -> None:
    ours = sampler(GenerationConfig(temperature=0, repetition_penalty=100), prompts=[[]])
    positive = logits(1).abs() + 1
    drawn = [int(ours(positive)) for _ in range(VOCAB)]
    assert sorted(drawn) == list(range(VOCAB)), (
        "the largest penalty on positive logits must visit every token once"
    )


def test_settings_apply_row_by_row() -> None:
    mixed = [
        GenerationConfig(temperature=0),
        GenerationConfig(temperature=0.7, top_k=3, seed=1),
        GenerationConfig(temperature=1.5, top_p=0.4, seed=2),
        GenerationConfig(temperature=1.0, min_p=0.2, repetition_penalty=1.4, seed=3),
        GenerationConfig(temperature=2.0, seed=4),
    ]
    prompts = [[1], [2, 3], [4], [5, 6, 7], [8]]
    together = sampler(*mixed, prompts=prompts)
    separate = [sampler(each, prompts=[prompt]) for each, prompt in zip(mixed, prompts, strict=True)]
    for step in range(20):
        scores = logits(5, seed=step)
        alone = torch.cat([one(scores[index : index + 1]) for index, one in enumerate(separate)])
        assert torch.equal(together(scores), alone)


def test_draws_depend_on_seed_and_sample() -> None:
    def drawn(seed: int | None, sample: int = 0) -> list[int]:
        ours = Sampler([SamplingState(GenerationConfig(temperature=1.5, seed=seed), [], sample)], VOCAB)
        return [int(ours(logits(1, step))) for step in range(30)]

    assert drawn(7) == drawn(7)
    assert drawn(7) != drawn(8)
    assert drawn(7) != drawn(7, sample=1)
    assert drawn(None) != drawn(None)


def test_greedy_is_the_first_argmax() -> None:
    scores = torch.tensor([[1.0, 5.0, 5.0, 2.0]], dtype=torch.bfloat16)
    assert sampler(GenerationConfig(temperature=0), vocab=4)(scores).tolist() == [1]


@pytest.mark.parametrize("temperature", [1e-40, 1e-30, 1e-7, 1e-6])
@pytest.mark.parametrize("top_p", [None, 0.9])
def test_a_temperature_too_small_to_divide_by_is_greedy(temperature: float, top_p: float | None) -> None:
    logits = torch.tensor([[0.0, -8e4, 9e4, 8.9e4], [1.0, 0.0, -1.0, 2.0]])
    cold = SamplingState(GenerationConfig(temperature=temperature, top_p=top_p, seed=1))
    assert Sampler([cold, cold], 4)(logits).tolist() == [2, 3]
    warm = SamplingState(GenerationConfig(temperature=1.0, top_k=1, seed=1))
    assert Sampler([cold, warm], 4)(logits).tolist() == [2, 3]


def test_top_k_1_is_greedy_at_any_temperature() -> None:
    assert torch.equal(
        sampler(*[GenerationConfig(temperature=5.0, top_k=1)] * 8)(logits(8)), logits(8).argmax(-1)
    )


@hypothesis_settings(max_examples=60)
@given(seed=st.integers(0, 10_000), top_p=st.floats(0.01, 0.999), probe=st.integers(1, 40))
def test_top_p_keeps_the_fewest_tokens_that_reach_it(seed: int, top_p: float, probe: int) -> None:
    scores = logits(1, seed).double()
    kept = keep_top_p(scores, torch.tensor([[top_p]], dtype=torch.float64), probe=probe)[0].isfinite()
    probabilities = scores.softmax(-1)[0]
    assert kept[probabilities.argmax()]
    assert probabilities[kept].min() >= probabilities[~kept].max() if (~kept).any() else True
    assert probabilities[kept].sum() >= top_p - 1e-9
    assert probabilities[kept].sum() - probabilities[kept].min() < top_p + 1e-9


@hypothesis_settings(max_examples=40)
@given(seed=st.integers(0, 10_000), top_k=st.lists(st.integers(1, VOCAB + 5), min_size=3, max_size=3))
def test_top_k_keeps_k_by_row(seed: int, top_k: list[int]) -> None:
    scores = logits(3, seed)
    kept = keep_top_k(scores, top_k).isfinite()
    assert kept.sum(-1).tolist() == [min(k, VOCAB) for k in top_k]
    for row in range(3):
        assert kept[row, scores[row].argmax()]


def test_min_p_is_relative_to_the_likeliest() -> None:
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert keep_min_p(scores, torch.tensor([[0.25]])).isfinite().tolist() == [[True, True, True, False]]


def test_draw_inverts_the_cumulative_distribution() -> None:
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    for uniform, token in [
        (0.0, 1),
        (0.2499, 1),
        (0.25, 3),
        (0.7499, 3),
        (0.75, 4),
        (math.nextafter(1.0, 0.0), 4),
    ]:
        assert draw(probabilities, [uniform]).tolist() == [token]


def test_draws_follow_the_probabilities() -> None:
    probabilities = logits(1, vocab=8).softmax(-1)
    grid = [(index + 0.5) / 4000 for index in range(4000)]
    counts = torch.bincount(draw(probabilities.expand(4000, -1), grid), minlength=8) / 4000
    torch.testing.assert_close(counts, probabilities[0], atol=1e-3, rtol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "each",
    [
        GenerationConfig(temperature=0),
        GenerationConfig(temperature=1.0, top_p=0.9, top_k=5, min_p=0.1),
        GenerationConfig(temperature=1.0, repetition_penalty=1.3),
    ],
    ids=["greedy", "restricted", "penalty"],
)
def test_logits_that_are_not_finite_are_an_error(bad: float, each: GenerationConfig) -> None:
    spoiled = logits(2)
    spoiled[1, 7] = bad
    with pytest.raises(NotFiniteError, match=r"not finite numbers.*earlier checkpoint"):
        sampler(each, each)(spoiled)


def test_a_draw_never_leaves_the_vocabulary() -> None:
    assert 0 <= int(draw(torch.full((1, VOCAB), math.nan), [0.5])) < VOCAB


@pytest.mark.parametrize("penalty", [1e-300, 0.0, 1e30, math.nan])
def test_a_repetition_penalty_that_overflows_is_refused(penalty: float) -> None:
    with pytest.raises(UsageError, match="repetition_penalty"):
        GenerationConfig(repetition_penalty=penalty)


@pytest.mark.parametrize("penalty", [0.01, 100.0])
def test_the_bounds_of_the_penalty_give_finite_probabilities(penalty: float) -> None:
    prompt = list(range(VOCAB))
    each = GenerationConfig(temperature=1.0, repetition_penalty=penalty, seed=1)
    assert 0 <= int(sampler(each, prompts=[prompt])(logits(1) * 100)) < VOCAB
