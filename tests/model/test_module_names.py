"""Parameters and FLOPs counted from the shape equal those of the model and of PyTorch's own counter."""

import pytest
import torch
from model_shapes import SHAPES, small_config
from torch.utils.flop_counter import FlopCounterMode

from llm_trainer.config import ModelConfig, UsageError
from llm_trainer.config.param_count import parameter_count, params_per_module
from llm_trainer.model.flops import attention_span, estimate_flops
from llm_trainer.model.module_names import parameter_counts, part_names, part_of_parameter, resolve_part
from llm_trainer.model.transformer import Transformer


@pytest.mark.parametrize("shape", SHAPES)
def test_the_parameter_count_of_the_shape_is_that_of_the_model(shape):
    config = small_config(**SHAPES[shape])
    model = Transformer(config)
    assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())
    assert params_per_module(config) == parameter_counts(model)


def test_gpt2_has_the_published_number_of_parameters():
    assert parameter_count(ModelConfig()) == 124_439_808


def test_tied_weights_count_once():
    tied, untied = small_config(), small_config(tie_word_embeddings=False)
    assert parameter_count(untied) - parameter_count(tied) == tied.vocab_size * tied.hidden_size
    assert parameter_counts(Transformer(tied))["lm_head"] == 0


@pytest.mark.parametrize("shape", ["gpt2", "llama", "grouped"])
def test_the_flop_estimate_equals_pytorchs_count(shape):
    config = small_config(**SHAPES[shape])
    model, ids = Transformer(config), torch.zeros(2, 16, dtype=torch.long)
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model(ids).sum().backward()
    vectors = sum(
        parameter.numel() for parameter in model.parameters() if parameter.dim() < 2
    )  # biases and norms, which it leaves out
    ours = estimate_flops(config, context=16) - 6 * vectors
    counted = counter.get_total_flops() / ids.numel()
    assert ours == pytest.approx(counted, rel=1e-6)


def test_a_causal_count_takes_the_mean_of_the_visible_tokens():
    config = small_config(sliding_window=4)
    seen = [min(position + 1, 4) for position in range(10)]
    assert attention_span(config, 10, causal=True) == pytest.approx(sum(seen) / 10)
    assert attention_span(config, 10, causal=False) == 4
    assert estimate_flops(config, 10, causal=True) < estimate_flops(config, 10)


def test_every_parameter_belongs_to_the_part_that_contains_it():
    model = Transformer(small_config(**SHAPES["grouped"]))
    for name, parameter in model.named_parameters():
        of_part = resolve_part(model, part_of_parameter(name)).parameters()
        assert any(parameter is other for other in of_part), name


def test_parts_are_found_in_a_compiled_model_too():
    model = Transformer(small_config())
    compiled = torch.compile(model)
    assert part_names(compiled) == part_names(model)
    assert resolve_part(compiled, "attn.1") is model.blocks[1].attn
    assert part_of_parameter("_orig_mod.blocks.1._orig_mod.mlp.up_proj.weight") == "mlp.1"


@pytest.mark.parametrize("name", ["attn.9", "attention.0", "wpe"])
def test_an_unknown_part_is_an_error_that_lists_the_parts(name):
    model = Transformer(small_config(position_embedding="rope"))
    with pytest.raises(UsageError, match=r"attn\.0 … attn\.1") as caught:
        resolve_part(model, name)
    assert name in str(caught.value)
    assert "lm_head" in str(caught.value)
