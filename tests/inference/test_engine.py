"""Generated ids do not depend on cache, batch or streaming, and generation ends where it should."""

import pytest
import torch

from llm_trainer.config.schema.generation import GenerationConfig
from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.errors import DataError, NotFiniteError, UsageError
from llm_trainer.inference.engine import LanguageModel
from llm_trainer.model.transformer import Transformer

TEXT = "The quick brown fox jumps over the lazy dog. Größe, naïve café, 東京 🙂🙃. " * 8
SHAPES = {
    "gpt2": {"model_type": "gpt2"},
    "llama": {"model_type": "llama", "num_key_value_heads": 2},
    "windowed": {"model_type": "llama", "sliding_window": 5, "qk_norm": True, "logit_soft_cap": 5.0},
    "post_norm": {"model_type": "gpt2", "pre_norm": False, "position_embedding": "none"},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_bpe([TEXT], 300)


def make(
    shape: str, tokenizer: Tokenizer | None, *, context: int = 48, seed: int = 0, **own: object
) -> LanguageModel:
    rows = 300 if tokenizer is None else tokenizer.vocab_size + 7  # the embedding has padding rows
    size = {
        "vocab_size": rows,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": context,
    }
    config = ModelConfig(**{**size, **SHAPES[shape], "initializer_range": 0.3, **own})
    return LanguageModel(Transformer(config, torch.Generator().manual_seed(seed)), tokenizer)


def greedy(count: int = 20, **own: object) -> GenerationConfig:
    return GenerationConfig(temperature=0, max_new_tokens=count, **own)


def prompts(sizes: tuple[int, ...], vocab: int = 300) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(vocab, (size,), generator=generator).tolist() for size in sizes]


@torch.inference_mode()
def without_cache(model: LanguageModel, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model.model(torch.tensor([ids]))[0, -1, : model.vocab_size].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_ids_with_a_cache_equal_those_without(shape: str) -> None:
    model = make(shape, None)
    for prompt in prompts((1, 7, 20)):
        assert model.generate_ids([prompt], greedy())[0].ids == without_cache(model, prompt, 20)


@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_of_different_lengths_in_a_batch_equal_each_alone(shape: str) -> None:
    model = make(shape, None)
    ragged = prompts((3, 1, 11, 24, 3))
    counts = [20, 3, 9, 24, 1]  # rows end at different steps and leave the batch
    together = model.generate_ids(ragged, [greedy(count) for count in counts])
    alone = [
        model.generate_ids([prompt], greedy(count))[0] for prompt, count in zip(ragged, counts, strict=True)
    ]
    assert together == alone
    assert [len(answer.ids) for answer in together] == counts


def test_more_prompts_than_the_maximum_batch() -> None:
    model = make("llama", None)
    many = prompts(tuple(1 + index % 5 for index in range(40)))
    assert model.generate_ids(many, greedy(3)) == [
        model.generate_ids([prompt], greedy(3))[0] for prompt in many
    ]


def test_sampled_text_depends_on_its_seed_alone() -> None:
    model = make("llama", None)
    mine, others = prompts((6,)), prompts((9, 2, 4))
    settings = GenerationConfig(seed=11, temperature=1.2, top_k=50, top_p=0.95, max_new_tokens=16)
    company = [GenerationConfig(seed=seed, temperature=2.0, max_new_tokens=5 * seed) for seed in (1, 2, 3)]
    alone = model.generate_ids(mine, settings)[0]
    assert (
        model.generate_ids([others[0], *mine, *others[1:]], [company[0], settings, *company[1:]])[1] == alone
    )
    assert model.generate_ids(mine, settings)[0] == alone
    assert model.generate_ids(mine, GenerationConfig(**{**settings.model_dump(), "seed": 12}))[0] != alone


def test_samples_of_one_prompt_differ_and_the_first_is_the_single_one(tokenizer: Tokenizer) -> None:
    model = make("llama", tokenizer)
    single = model.generate("The fox", seed=5, max_tokens=12, temperature=1.5)
    several = model.generate("The fox", seed=5, max_tokens=12, temperature=1.5, num_samples=3)
    assert several[0] == single
    assert len(set(several)) == 3


def test_generate_takes_one_prompt_or_several_and_any_name_of_a_setting(tokenizer: Tokenizer) -> None:
    model = make("gpt2", tokenizer)
    one = model.generate("The fox", max_tokens=5, temperature=0)
    assert model.generate(["The fox", "dog"], max_new_tokens=5, temperature=0) == [
        one,
        model.generate("dog", max_tokens=5, temperature=0),
    ]
    with pytest.raises(UsageError, match="temprature"):
        model.generate("The fox", temprature=1)
    with pytest.raises(UsageError, match="temperature"):
        model.generate("The fox", temperature=-1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("stops", [[], ["e", " q"], ["東", "🙂", "\ufffd"]])
def test_concatenated_pieces_are_the_generated_text(
    tokenizer: Tokenizer, seed: int, stops: list[str]
) -> None:
    model = make("llama", tokenizer, seed=seed)
    settings = GenerationConfig(seed=seed, temperature=1.0, max_new_tokens=40, stop=stops)
    full = model.generate("The", settings)
    assert "".join(model.stream("The", settings)) == full
    assert not any(stop in full for stop in stops)
    if not stops:
        ids = model.complete(["The"], settings)[0].ids
        assert full == tokenizer.decode(ids)


def test_a_stop_string_across_tokens_ends_the_text_where_it_begins(tokenizer: Tokenizer) -> None:
    model = make("llama", tokenizer)
    settings = GenerationConfig(seed=1, temperature=1.0, max_new_tokens=40, ignore_eos=True)
    full = model.complete(["The"], settings)[0]
    pieces = [tokenizer.token_bytes(token).decode("utf-8", errors="replace") for token in full.ids]
    border = sum(map(len, pieces[:10]))
    stop = full.text[border - 1 : border + 1]
    cut = model.generate("The", settings, stop=[stop])
    assert cut == full.text[: full.text.index(stop)]
    completion = model.complete(["The"], GenerationConfig(**{**settings.model_dump(), "stop": [stop]}))[0]
    assert completion.finish_reason == "stop"
    assert len(completion.ids) < 40


def test_the_end_of_text_stops_unless_ignored() -> None:
    model = make("llama", None)
    (prompt,) = prompts((4,))
    free = model.generate_ids([prompt], greedy(12))[0].ids
    end = free[5]
    stopping = LanguageModel(model.model, None, end_ids=[end])
    answer = stopping.generate_ids([prompt], greedy(12))[0]
    assert (answer.ids, answer.finish_reason) == (free[: free.index(end)], "stop")
    ignoring = stopping.generate_ids([prompt], greedy(12, ignore_eos=True))[0]
    assert (ignoring.ids, ignoring.finish_reason) == (free, "length")


def test_generation_ends_where_the_context_is_full() -> None:
    model = make("gpt2", None, context=16)
    answers = model.generate_ids(prompts((4, 15, 16)), greedy(100))
    assert [len(answer.ids) for answer in answers] == [12, 1, 0]
    assert {answer.finish_reason for answer in answers} == {"length"}
    with pytest.raises(UsageError, match=r"17 tokens.*context is 16"):
        model.generate_ids(prompts((17,)), greedy())


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_a_sliding_context_continues_from_the_second_half_of_a_full_one(shape: str) -> None:
    model = make(shape, None, context=12)
    ragged = prompts((3, 12, 9, 17))
    answers = model.generate_ids(ragged, [greedy(count, sliding_context=True) for count in (30, 25, 4, 20)])
    assert [len(answer.ids) for answer in answers] == [30, 25, 4, 20]
    for prompt, answer in zip(ragged, answers, strict=True):
        seen = prompt[-12:]
        for token in answer.ids:
            seen = seen[-6:] if len(seen) > 12 else seen
            assert token == without_cache(model, seen, 1)[0]
            seen = [*seen, token]


def test_padding_rows_of_the_embedding_are_never_sampled(tokenizer: Tokenizer) -> None:
    model = make("gpt2", tokenizer)
    with torch.no_grad():
        model.model.wte.weight[tokenizer.vocab_size :] *= 50
    answers = model.generate_ids(
        prompts((3, 5)), GenerationConfig(temperature=3.0, seed=0, max_new_tokens=30)
    )
    assert max(max(answer.ids) for answer in answers) < tokenizer.vocab_size


def test_a_tokenizer_larger_than_the_embedding_is_refused(tokenizer: Tokenizer) -> None:
    config = ModelConfig(vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(UsageError, match=r"300 tokens.*100 rows"):
        LanguageModel(Transformer(config), tokenizer)


def test_an_empty_prompt_starts_a_text(tokenizer: Tokenizer) -> None:
    model = make("gpt2", tokenizer)
    assert model.encode_prompt("") == [tokenizer.bos_id]
    characters = Tokenizer.from_characters(["abc\n"])
    assert make("gpt2", characters).encode_prompt("") == characters.encode("\n")
    with pytest.raises(DataError, match=r"\\n"):
        make("gpt2", Tokenizer.from_characters(["abc"])).encode_prompt("")


def test_characters_missing_in_a_character_tokenizer_are_named() -> None:
    model = make("gpt2", Tokenizer.from_characters(["abc\n"]))
    with pytest.raises(DataError, match="'z'"):
        model.generate("abz")


def test_ids_outside_the_vocabulary_and_empty_prompts_are_refused() -> None:
    model = make("gpt2", None)
    for wrong in ([5, 300], [-1]):
        with pytest.raises(UsageError, match=str(wrong[-1])):
            model.generate_ids([wrong], greedy())
    with pytest.raises(UsageError, match="empty"):
        model.generate_ids([[]], greedy())


def test_streaming_refuses_before_the_first_piece(tokenizer: Tokenizer) -> None:
    model = make("gpt2", tokenizer, context=8)
    with pytest.raises(UsageError, match="context is 8"):
        model.stream(TEXT)
    with pytest.raises(UsageError, match="num_samples=2"):
        model.stream("The", num_samples=2)


def test_zero_new_tokens_give_an_empty_text(tokenizer: Tokenizer) -> None:
    model = make("gpt2", tokenizer)
    assert model.generate("The", max_tokens=0) == ""
    assert list(model.stream("The", max_tokens=0)) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["wte.weight", "lm_head.weight", "ln_f.weight"])
def test_a_model_with_damaged_weights_generates_nothing(name: str, temperature: float) -> None:
    model = make("llama", None, tie_word_embeddings=False)
    model.model.get_parameter(name).data[-1] = torch.nan
    with pytest.raises(NotFiniteError):
        model.generate_ids([[299]], GenerationConfig(temperature=temperature, max_new_tokens=3))
