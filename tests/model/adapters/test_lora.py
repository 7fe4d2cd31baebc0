"""Low-rank adapters: what they compute, and that adding, growing, merging and removing them keeps the
function.
"""

from __future__ import annotations

import copy

import pytest
import torch
from model_shapes import small_config
from torch import Tensor, nn

from llm_trainer.config import UsageError
from llm_trainer.config.param_count import params_per_module
from llm_trainer.config.schema.lora import LoraConfig
from llm_trainer.model.adapters.lora import (
    active_adapters,
    add_adapters,
    is_adapter_parameter,
    merge_lora,
    remove_adapters,
    set_adapters,
    set_lora_rank,
)
from llm_trainer.model.hf.checkpoint import load_pretrained, save_pretrained
from llm_trainer.model.layers import Linear
from llm_trainer.model.module_names import parameter_counts
from llm_trainer.model.transformer import Transformer

IDS = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(3))
EVERYWHERE = {"attn_lora_rank": 4, "mlp_lora_rank": 3, "embedding_lora_rank": 2, "lora_alpha": 5.0}
SHAPES = {"gpt2": {}, "llama": {"model_type": "llama", "num_key_value_heads": 2, "head_lora_rank": 2}}


def model_of(dtype: torch.dtype = torch.float64, **changes: object) -> Transformer:
    return Transformer(small_config(**changes), torch.Generator().manual_seed(0)).to(dtype).eval()


@torch.no_grad()
def randomized(model: Transformer) -> Transformer:
    """The model with random adapters, which change what it computes."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if is_adapter_parameter(name):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def logits(model: Transformer) -> Tensor:
    with torch.no_grad():
        return model(IDS)


@pytest.mark.parametrize("shape", SHAPES)
def test_fresh_adapters_change_nothing_and_trained_ones_do(shape: str) -> None:
    plain = model_of(**SHAPES[shape] | {"head_lora_rank": 0})
    model = model_of(**SHAPES[shape] | EVERYWHERE)
    assert torch.equal(logits(model), logits(plain))
    assert (logits(randomized(model)) - logits(plain)).abs().max() > 1e-2


@pytest.mark.parametrize("shape", SHAPES)
def test_an_adapted_model_is_the_model_of_the_summed_matrices(shape: str) -> None:
    model = randomized(model_of(**SHAPES[shape] | EVERYWHERE))
    plain = model_of(**SHAPES[shape] | {"head_lora_rank": 0})
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            owner = model.get_submodule(name.rpartition(".")[0])
            parameter.copy_(getattr(owner, name.rpartition(".")[2]))
            for factors in getattr(owner, "lora", {}).values():
                if name.endswith("weight"):
                    parameter.add_(factors.b @ factors.a * 5.0 / factors.a.size(0))
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_trained", [True, False])
def test_fused_products_in_training_equal_those_of_inference(shape: str, is_trained: bool) -> None:
    model = randomized(model_of(**SHAPES[shape] | EVERYWHERE))
    for parameter in model.parameters():
        parameter.requires_grad_(is_trained)
    torch.testing.assert_close(model(IDS).detach(), logits(model), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_growing_merging_and_removing_keep_the_function(shape: str, dtype: torch.dtype, bound: float) -> None:
    model = randomized(model_of(dtype, **SHAPES[shape] | EVERYWHERE))
    before = logits(model)

    def assert_unchanged() -> None:
        torch.testing.assert_close(logits(model), before, rtol=0, atol=bound)

    model.set_layer_lora_rank("attn.*", 9)
    assert model.blocks[1].attn.q_proj.lora["default"].rank == 9
    assert_unchanged()
    model.set_layer_lora_rank("mlp.0", 0)
    assert type(model.blocks[0].mlp.up_proj) is Linear
    assert_unchanged()
    merge_lora(model)
    assert not model.blocks[0].attn.o_proj.lora["default"].b.any()
    assert_unchanged()
    randomized(model)
    before = logits(model)
    merge_lora(model, restart=False)
    assert_unchanged()
    assert model.config.lora == {}
    assert not any(is_adapter_parameter(name) for name, _ in model.named_parameters())
    assert Transformer(model.config).config.lora == {}, (
        "the single rank settings would create the adapters again"
    )


def test_a_smaller_rank_keeps_the_largest_singular_values() -> None:
    model = randomized(model_of(attn_lora_rank=6))
    factors = model.blocks[0].attn.q_proj.lora["default"]
    left, values, right = torch.linalg.svd(factors.delta().detach())
    model.set_layer_lora_rank("attn.0", 2)
    best = left[:, :2] * values[:2] @ right[:2]
    torch.testing.assert_close(
        model.blocks[0].attn.q_proj.lora["default"].delta().detach(), best, rtol=0, atol=1e-12
    )


def test_a_larger_rank_reads_new_directions() -> None:
    model = model_of()
    for rank in (2, 4, 8):
        set_lora_rank(model, "attn.0", rank)
        assert int(torch.linalg.matrix_rank(factor_a(model))) == rank


def test_restarted_adapters_read_the_directions_of_their_seed() -> None:
    model = model_of(attn_lora_rank=4)
    first = factor_a(model)
    for seed in (1, 2):
        merge_lora(model, seed=seed)
    second = factor_a(model)
    assert int(torch.linalg.matrix_rank(torch.cat([first, second]))) == 8
    merge_lora(model, seed=2)
    assert torch.equal(factor_a(model), second)
    set_lora_rank(model, "attn.0", 0)
    set_lora_rank(model, "attn.0", 4, seed=3)
    assert int(torch.linalg.matrix_rank(torch.cat([second, factor_a(model)]))) == 8


def factor_a(model: Transformer) -> Tensor:
    return model.blocks[0].attn.q_proj.lora["default"].a.detach().clone()


def test_rslora_and_alpha_set_the_scale() -> None:
    def scale(**settings: object) -> float:
        return float(model_of(attn_lora_rank=16, **settings).blocks[0].attn.q_proj.lora["default"].scale)

    assert scale() == 2.0
    assert scale(lora_alpha=4) == 0.25
    assert scale(lora_alpha=4, use_rslora=True) == 1.0


def test_adapters_are_saved_and_loaded(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = randomized(model_of(torch.float32, **EVERYWHERE))
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.lora == model.config.lora


def test_only_the_active_sets_are_added() -> None:
    model = model_of()
    without = logits(model)
    add_adapters(model, "poetry", LoraConfig(ranks={"attn.0": 2}))
    add_adapters(model, "law", LoraConfig(ranks={"attn.0.q_proj": 3, "mlp.1": 2}))
    randomized(model)
    both = logits(model)
    results = []
    for names in (["poetry"], ["law"], []):
        set_adapters(model, names)
        assert active_adapters(model) == names
        results.append(logits(model))
    assert torch.equal(results[-1], without)
    assert len({float(result.sum()) for result in [*results, both]}) == 4
    with pytest.raises(UsageError, match="poetry, law"):
        set_adapters(model, ["prose"])


def test_the_active_sets_are_saved_with_the_shape(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = model_of(torch.float32)
    for name in ("poetry", "law", "prose"):
        add_adapters(model, name, LoraConfig(ranks={"attn.0": 2}))
    randomized(model)
    for names in (["poetry", "law", "prose"], ["prose", "law"], []):
        set_adapters(model, names)
        save_pretrained(model, tmp_path / "-".join(["model", *names]))
        loaded = load_pretrained(tmp_path / "-".join(["model", *names]))
        assert active_adapters(loaded) == names
        assert torch.equal(logits(loaded), logits(model))
    set_adapters(model, ["law", "prose"])
    remove_adapters(model, "law")
    assert active_adapters(Transformer(model.config)) == active_adapters(model) == ["prose"]
    for name in ("prose", "poetry"):
        remove_adapters(model, name)
    model.set_layer_lora_rank("mlp.0", 2)
    assert active_adapters(model) == ["default"]
    with pytest.raises(UsageError, match="no adapter 'prose'"):
        model_of(active_adapters=["prose"])


def test_a_tied_embedding_and_head_share_their_adapter() -> None:
    model = randomized(model_of(embedding_lora_rank=3))
    assert model.wte.lora["default"] is model.lm_head.lora["default"]
    assert model.set_layer_lora_rank("wte", 5) == ["wte", "lm_head"]
    assert model.wte.lora["default"] is model.lm_head.lora["default"]


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_counted_alike_with_and_without_torch(shape: str) -> None:
    model = model_of(**SHAPES[shape] | EVERYWHERE)
    assert parameter_counts(model) == params_per_module(model.config)
    assert model.config == Transformer(copy.deepcopy(model.config)).config


def test_adapter_dropout_applies_in_training_only() -> None:
    model = randomized(model_of(attn_lora_rank=2, lora_dropout=0.5))
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_a_part_without_matrices_takes_no_adapter() -> None:
    model = model_of()
    with pytest.raises(UsageError, match=r"ln_1\.0"):
        set_lora_rank(model, "ln_1.0", 4)
    with pytest.raises(UsageError, match=r"attn\.7"):
        set_lora_rank(model, "attn.7", 4)
    with pytest.raises(UsageError, match=r"attn\.9"):
        model_of(lora={"default": {"ranks": {"attn.9": 2}}})


def test_modules_without_adapters_stay_plain() -> None:
    model = model_of(attn_lora_rank=2)
    assert type(model.blocks[0].mlp.up_proj) is Linear
    assert isinstance(model.blocks[0].attn.q_proj, nn.Linear)
