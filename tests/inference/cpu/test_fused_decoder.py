import pytest
import torch

from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.inference.cpu.fused_decoder import FusedStep
from llm_trainer.inference.cpu.matvec import multiply_vector
from llm_trainer.inference.engine import choose_step
from llm_trainer.inference.model_runner import DecodingStep, ModelStep
from llm_trainer.model.kv_cache import KVCache
from llm_trainer.model.transformer import Transformer

SHAPES: dict[str, dict[str, object]] = {
    "gpt2": {"model_type": "gpt2"},
    "llama": {"model_type": "llama", "num_key_value_heads": 2},
    "windowed": {"model_type": "llama", "sliding_window": 5, "qk_norm": True, "logit_soft_cap": 5.0},
    "qkv_bias": {"model_type": "llama", "qkv_bias": True, "num_key_value_heads": 1},
    "post_norm": {"model_type": "gpt2", "pre_norm": False, "positions": "none", "activation": "relu2"},
    "wide_heads": {"model_type": "llama", "head_dim": 16, "rope_scaling": {"kind": "linear", "factor": 2.0}},
}


def make(shape: str, dtype: torch.dtype = torch.float32) -> Transformer:
    size = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 40,
    }
    model = Transformer(
        ModelConfig(**{**size, **SHAPES[shape], "initializer_range": 0.2}), torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # biases of zero and norms of one would hide mistakes
                parameter.add_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
                )
    return model.to(dtype).eval()


@torch.inference_mode()
def run(model: Transformer, step: DecodingStep, starts: list[int], steps: int = 12) -> torch.Tensor:
    """Logits after steps that follow random prompts, row i from position starts[i]."""
    generator = torch.Generator().manual_seed(1)
    cache = KVCache(model.config, len(starts), 40, dtype=model.wte.weight.dtype)
    model.hidden_states(torch.randint(61, (len(starts), max(starts)), generator=generator), cache=cache)
    out = []
    for number in range(steps):
        ids = torch.randint(61, (len(starts),), generator=generator).tolist()
        out.append(model.logits(step(ids, [start + number for start in starts], cache)))
    return torch.stack(out)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("starts", [[7], [9, 9, 9], [3, 9, 1]])
def test_the_fused_step_is_the_models(shape: str, starts: list[int]) -> None:
    expected = run(make(shape), ModelStep(make(shape)), starts)
    fused = make(shape)
    torch.testing.assert_close(run(fused, FusedStep(fused), starts), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_the_fused_step_is_the_models_in_bf16(shape: str) -> None:
    model = make(shape, torch.bfloat16)
    exact = run(make(shape), ModelStep(make(shape)), [7])
    expected = run(model, ModelStep(model), [7]).float()
    found = run(model, FusedStep(model), [7]).float()
    rounding = (expected - exact).abs().mean()
    assert (found - exact).abs().mean() < 1.5 * rounding, (
        "not further from fp32 than the model in bf16 is itself"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype"), [("gpt2", torch.float32), ("windowed", torch.float32), ("qkv_bias", torch.bfloat16)]
)
def test_the_compiled_step_is_the_fused_one(shape: str, dtype: torch.dtype) -> None:
    model = make(shape, dtype)
    expected = run(model, FusedStep(model), [7])
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    torch.testing.assert_close(run(model, FusedStep(model, compile=True), [7]), expected, **close)


def test_the_matrix_vector_product_is_the_linear_map() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((1, 33), (17, 33), (17,)))
    torch.testing.assert_close(multiply_vector(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


def test_fusing_leaves_the_model_as_it_was() -> None:
    model = make("qkv_bias")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        logits = model(ids)
        FusedStep(model)
        assert torch.equal(model(ids), logits)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    attention = model.blocks[0].attn
    assert (
        attention.q_proj.weight.untyped_storage().data_ptr()
        == attention.v_proj.weight.untyped_storage().data_ptr()
    )


def test_a_model_with_unknown_layers_is_run_as_it_is() -> None:
    class Adapted(torch.nn.Linear):
        pass

    model = make("llama")
    assert isinstance(choose_step(model), FusedStep)
    model.blocks[1].attn.q_proj = Adapted(32, 32, bias=False)
    assert isinstance(choose_step(model), ModelStep)
