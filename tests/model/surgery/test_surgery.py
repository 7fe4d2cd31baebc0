"""A model that grows keeps its function, and optimizer state is transformed as gradients are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_trainer.config import ModelConfig, UsageError
from llm_trainer.model.adapters.lora import is_adapter_parameter
from llm_trainer.model.surgery.depth import stack_layers
from llm_trainer.model.surgery.model_state import ModelState
from llm_trainer.model.surgery.pruning import prune_heads, prune_mlp
from llm_trainer.model.surgery.vocabulary import read_remapping, resize_vocabulary
from llm_trainer.model.surgery.width import widen_mlp, widen_model
from llm_trainer.model.transformer import Transformer

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
IDS = torch.arange(24).view(2, 12) * 5 % 19


@st.composite
def shapes(draw: st.DrawFn) -> ModelConfig:
    """GPT-2's, Llama's and everything between."""
    groups, kv_heads, width = (
        draw(st.sampled_from([1, 2, 3])),
        draw(st.sampled_from([1, 2])),
        draw(st.sampled_from([2, 4])),
    )
    heads = groups * kv_heads
    free_width = draw(st.booleans())
    return ModelConfig(
        model_type=draw(st.sampled_from(["gpt2", "llama"])),
        vocab_size=19,
        hidden_size=heads * width + (4 if free_width else 0),
        head_dim=width if free_width else None,
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=draw(st.sampled_from([kv_heads, None])) if groups == 1 else kv_heads,
        intermediate_size=draw(st.sampled_from([None, 12])),
        max_position_embeddings=16,
        bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        pre_norm=draw(st.booleans()),
        logit_soft_cap=draw(st.sampled_from([None, 30.0])),
    )


def trained(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Transformer:
    """A model with no zeros and no ones, as after some training."""
    model = Transformer(config, torch.Generator().manual_seed(seed)).to(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.1)
    return model


def logits(state: ModelState) -> Tensor:
    with torch.no_grad():
        result: Tensor = state.to_model().eval()(IDS)
    return result


def identity_copies(state: ModelState) -> ModelState:
    layers = state.config.num_hidden_layers
    return stack_layers(state, [*range(layers), *range(layers)], identity=True)


def multiple(factor: int, noise: float = 0.5) -> Callable[[ModelState], ModelState]:
    def widen(state: ModelState) -> ModelState:
        old = state.config
        return widen_model(state, factor * old.hidden_size, factor * old.num_attention_heads, noise=noise)

    return widen


def half_more_units(noise: float = 0.5) -> Callable[[ModelState], ModelState]:
    return lambda state: widen_mlp(state, state.config.mlp_width * 3 // 2, noise=noise)


PRESERVING: dict[str, Callable[[ModelState], ModelState]] = {
    "identity copies": identity_copies,
    "wider MLP": half_more_units(),
    "twice as wide": multiple(2),
    "three times": multiple(3),
    "larger vocabulary": lambda state: resize_vocabulary(state, 23),
}


@pytest.mark.parametrize("change", PRESERVING)
@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=15)
@given(config=shapes())
def test_growth_keeps_the_function(change: str, dtype: torch.dtype, config: ModelConfig) -> None:
    if change == "identity copies":
        config.pre_norm = True
    model = trained(config, dtype)
    before = ModelState.from_model(model)
    after = PRESERVING[change](before)
    assert after.num_parameters > before.num_parameters
    difference = (logits(after)[..., :19] - logits(before)).abs().max()
    assert float(difference) <= TOLERANCE[dtype]


@settings(max_examples=15)
@given(config=shapes())
def test_a_wider_model_can_be_widened_and_stacked_again(config: ModelConfig) -> None:
    config.pre_norm = True
    before = ModelState.from_model(trained(config, torch.float64))
    after = half_more_units()(identity_copies(multiple(2)(before)))
    assert float((logits(after) - logits(before)).abs().max()) <= 1e-10


ADAPTERS: dict[str, dict[str, Any]] = {
    "bottlenecks": {"use_adapter_modules": True, "adapter_size": 3},
    "domains": {"use_domain_adaptation": True, "adapter_size": 3},
    "bottlenecks after the last norm": {
        "use_adapter_modules": True,
        "use_domain_adaptation": True,
        "adapter_size": 3,
        "pre_norm": False,
    },
    "low rank": {
        "attn_lora_rank": 2,
        "mlp_lora_rank": 3,
        "embedding_lora_rank": 2,
        "tie_word_embeddings": False,
    },
}
ADAPTED_SHAPE: dict[str, Any] = {
    "vocab_size": 19,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 16,
}


@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize("change", PRESERVING)
def test_growth_keeps_the_function_of_trained_adapters(change: str, adapters: str) -> None:
    config = ModelConfig(**ADAPTED_SHAPE | ADAPTERS[adapters])
    config.pre_norm |= change == "identity copies"
    before = ModelState.from_model(trained(config, torch.float64))
    after = PRESERVING[change](before)
    assert float((logits(after)[..., :19] - logits(before)).abs().max()) <= 1e-10


@pytest.mark.parametrize("adapters", ["low rank", "bottlenecks", "domains"])
def test_adapters_of_identity_copies_learn_over_a_frozen_base(adapters: str) -> None:
    before = ModelState.from_model(trained(ModelConfig(**ADAPTED_SHAPE | ADAPTERS[adapters]), torch.float64))
    frozen = frozenset(name for name in before.weights if not is_adapter_parameter(name))
    model = identity_copies(replace(before, frozen=frozen)).to_model()
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(2):  # only in the second step do layers before a zero output have a gradient
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.roll(-1).flatten()).backward()
        optimizer.step()
    copies = {
        name: one
        for name, one in model.named_parameters()
        if name.startswith(("blocks.2.", "blocks.3.")) and one.requires_grad
    }
    assert copies
    assert [name for name, parameter in copies.items() if torch.equal(parameter, start[name])] == []


def test_models_with_bottleneck_adapters_can_be_pruned() -> None:
    state = ModelState.from_model(
        trained(ModelConfig(**ADAPTED_SHAPE | ADAPTERS["domains"] | ADAPTERS["bottlenecks"]))
    )
    smaller = prune_heads(prune_mlp(state, "mlp.0", 0.5), "attn.1", 0.5)
    assert bool(torch.isfinite(logits(smaller)).all())
    name = "blocks.0.domain_adapter.down"
    assert torch.equal(smaller.weights[name], state.weights[name])


def test_heads_may_grow_by_another_factor_than_the_stream() -> None:
    config = ModelConfig(
        vocab_size=19,
        hidden_size=8,
        head_dim=4,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=16,
    )
    before = ModelState.from_model(trained(config, torch.float64))
    after = widen_model(before, 16, 6)
    assert (after.config.num_attention_heads, after.config.head_width) == (6, 4)
    assert float((logits(after) - logits(before)).abs().max()) <= 1e-10


def gradients(state: ModelState) -> dict[str, Tensor]:
    model = state.to_model().eval()
    loss = torch.nn.functional.cross_entropy(model(IDS)[..., :19].flatten(0, 1), IDS.roll(-1).flatten())
    torch.autograd.backward(loss)
    return {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize(
    "change", [half_more_units(noise=0), multiple(2, noise=0)], ids=["wider MLP", "twice as wide"]
)
@settings(max_examples=20)
@given(config=shapes())
def test_gradient_averages_become_those_of_the_grown_model(
    change: Callable[[ModelState], ModelState], config: ModelConfig
) -> None:
    """Averages that equal the gradients become the grown model's gradients, and so do their squares."""
    assert_averages_are_transformed(change, config)


@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize(
    "change", [half_more_units(noise=0), multiple(2, noise=0)], ids=["wider MLP", "twice as wide"]
)
def test_gradient_averages_of_adapters_become_those_of_the_grown_model(
    change: Callable[[ModelState], ModelState], adapters: str
) -> None:
    assert_averages_are_transformed(change, ModelConfig(**ADAPTED_SHAPE | ADAPTERS[adapters]))


def assert_averages_are_transformed(change: Callable[[ModelState], ModelState], config: ModelConfig) -> None:
    before = ModelState.from_model(trained(config, torch.float64))
    found = gradients(before)
    state = {
        name: {"exp_avg": g, "exp_avg_sq": g * g, "momentum_buffer": g, "step": torch.tensor(7.0)}
        for name, g in found.items()
    }
    after = change(replace(before, optimizer_state=state))
    for name, expected in gradients(after).items():
        kept = after.optimizer_state[name]
        torch.testing.assert_close(kept["exp_avg"], expected, atol=1e-9, rtol=1e-6)
        torch.testing.assert_close(kept["momentum_buffer"], expected, atol=1e-9, rtol=1e-6)
        torch.testing.assert_close(kept["exp_avg_sq"], expected * expected, atol=1e-9, rtol=1e-6)
        assert float(kept["step"]) == 7


@pytest.mark.parametrize("change", [half_more_units(), multiple(2)], ids=["wider MLP", "twice as wide"])
def test_copies_get_different_gradients(change: Callable[[ModelState], ModelState]) -> None:
    """Equal copies with equal readers would have equal gradients for ever."""
    config = ModelConfig(
        vocab_size=19, hidden_size=8, num_attention_heads=2, num_hidden_layers=2, max_position_embeddings=16
    )
    after = change(ModelState.from_model(trained(config, torch.float64)))
    units = gradients(after)["blocks.0.mlp.up_proj.weight"]
    assert len({tuple(row) for row in units.round(decimals=12).tolist()}) == len(units)


def test_widening_is_the_same_for_the_same_seed() -> None:
    config = ModelConfig(
        vocab_size=19, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, max_position_embeddings=16
    )
    state = ModelState.from_model(trained(config))
    one, other = (widen_mlp(state, 48, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


def with_state(model: Transformer) -> ModelState:
    state = ModelState.from_model(model)
    return replace(
        state, optimizer_state={name: {"exp_avg": weight + 1} for name, weight in state.weights.items()}
    )


def test_stacked_blocks_have_their_own_weights_and_optimizer_state() -> None:
    config = ModelConfig(
        vocab_size=19, hidden_size=8, num_attention_heads=2, num_hidden_layers=2, max_position_embeddings=16
    )
    state = with_state(trained(config))
    after = stack_layers(state, [0, 0, 1, 0])
    for number, source in enumerate([0, 0, 1, 0]):
        old, new = f"blocks.{source}.mlp.up_proj.weight", f"blocks.{number}.mlp.up_proj.weight"
        assert torch.equal(after.weights[new], state.weights[old])
        assert torch.equal(after.optimizer_state[new]["exp_avg"], state.optimizer_state[old]["exp_avg"])
    copies = [after.weights[f"blocks.{number}.mlp.up_proj.weight"] for number in (0, 1, 3)]
    assert len({copy.data_ptr() for copy in copies}) == 3
    assert after.to_model().config.num_hidden_layers == 4


def test_identity_is_refused_where_the_function_would_change() -> None:
    config = ModelConfig(
        vocab_size=19, hidden_size=8, num_attention_heads=2, num_hidden_layers=2, max_position_embeddings=16
    )
    state = ModelState.from_model(trained(config))
    for sources in ([1, 0], [0, 0], [1, 1, 0]):
        with pytest.raises(UsageError, match="identity"):
            stack_layers(state, sources, identity=True)
    with pytest.raises(UsageError, match="pre_norm"):
        stack_layers(
            ModelState.from_model(trained(config.model_copy(update={"pre_norm": False}))),
            [0, 0, 1],
            identity=True,
        )


def test_widths_that_cannot_keep_the_function_need_approximate() -> None:
    config = ModelConfig(
        vocab_size=19, hidden_size=8, num_attention_heads=2, num_hidden_layers=2, max_position_embeddings=16
    )
    state = ModelState.from_model(trained(config))
    for hidden, heads in ((12, 3), (16, 2), (8, 4)):
        with pytest.raises(UsageError, match="approximate"):
            widen_model(state, hidden, heads)
        wider = widen_model(state, hidden, heads, approximate=True)
        assert wider.config.head_width == 4
        assert bool(torch.isfinite(logits(wider)).all())
    with pytest.raises(UsageError, match="narrower"):
        widen_model(state, 4, 1)
    with pytest.raises(UsageError, match="narrower"):
        widen_mlp(state, 8)


def test_a_remapping_file_moves_rows_and_gives_new_ids_the_mean(tmp_path: Path) -> None:
    config = ModelConfig(
        vocab_size=19, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, max_position_embeddings=16
    )
    state = with_state(trained(config))
    path = tmp_path / "remap.json"
    path.write_text(json.dumps({"3": 0, "0": 2}), encoding="utf-8")
    after = resize_vocabulary(state, 4, read_remapping(path))
    old, new = state.weights["wte.weight"], after.weights["wte.weight"]
    assert torch.equal(new[[0, 2]], old[[3, 0]])
    torch.testing.assert_close(new[1], old.mean(0))
    torch.testing.assert_close(new[3], old.mean(0))
    assert torch.equal(after.optimizer_state["wte.weight"]["exp_avg"][0], old[3] + 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "vocabulary remapping file .* does not exist"),
        ("[1]", "not a vocabulary remapping"),
        ('{"1": 2, "3": 2}', "two old ids"),
        ("{", "read"),
    ],
)
def test_an_invalid_remapping_file_is_refused_by_name(
    tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "remap.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        read_remapping(path)
