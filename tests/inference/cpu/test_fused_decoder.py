"""The fused decoder computes what the model computes, eager and compiled, and can be switched off."""

import pytest
import torch

from llm_trainer.config.schema.generation import GenerationConfig
from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.errors import UsageError
from llm_trainer.inference.cpu.fused_decoder import FusedDecoder
from llm_trainer.inference.cpu.matvec import matvec
from llm_trainer.inference.engine import LanguageModel, select_runner
from llm_trainer.inference.model_runner import EagerModelRunner, ModelRunner
from llm_trainer.model.kv_cache import KVCache
from llm_trainer.model.transformer import Transformer

SHAPES: dict[str, dict[str, object]] = {
    "gpt2": {"model_type": "gpt2"},
    "llama": {"model_type": "llama", "num_key_value_heads": 2},
    "windowed": {"model_type": "llama", "sliding_window": 5, "qk_norm": True, "logit_soft_cap": 5.0},
    "qkv_bias": {"model_type": "llama", "qkv_bias": True, "num_key_value_heads": 1},
    "post_norm": {
        "model_type": "gpt2",
        "pre_norm": False,
        "position_embedding": "none",
        "activation": "relu2",
    },
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
def run(model: Transformer, runner: ModelRunner, starts: list[int], steps: int = 12) -> torch.Tensor:
    """Logits after steps that follow random prompts, row i from position starts[i]."""
    generator = torch.Generator().manual_seed(1)
    cache = KVCache(model.config, len(starts), 40, dtype=model.wte.weight.dtype)
    model.hidden_states(torch.randint(61, (len(starts), max(starts)), generator=generator), cache=cache)
    out = []
    for number in range(steps):
        ids = torch.randint(61, (len(starts),), generator=generator).tolist()
        out.append(model.logits(runner(ids, [start + number for start in starts], cache)))
    return torch.stack(out)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("starts", [[7], [9, 9, 9], [3, 9, 1]])
def test_the_fused_decoder_equals_the_model(shape: str, starts: list[int]) -> None:
    expected = run(make(shape), EagerModelRunner(make(shape)), starts)
    fused = make(shape)
    torch.testing.assert_close(run(fused, FusedDecoder(fused), starts), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_the_fused_decoder_is_as_exact_as_the_model_in_bf16(shape: str) -> None:
    model = make(shape, torch.bfloat16)
    exact = run(make(shape), EagerModelRunner(make(shape)), [7])
    expected = run(model, EagerModelRunner(model), [7]).float()
    found = run(model, FusedDecoder(model), [7]).float()
    rounding = (expected - exact).abs().mean()
    assert (found - exact).abs().mean() < 1.5 * rounding, (
        "the error against fp32 is that of the model in bf16"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype"), [("gpt2", torch.float32), ("windowed", torch.float32), ("qkv_bias", torch.bfloat16)]
)
def test_the_compiled_decoder_equals_the_eager_one(shape: str, dtype: torch.dtype) -> None:
    model = make(shape, dtype)
    expected = run(model, FusedDecoder(model), [7])
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    torch.testing.assert_close(run(model, FusedDecoder(model, compile=True), [7]), expected, **close)


def test_the_matrix_vector_product_equals_the_linear_map() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((1, 33), (17, 33), (17,)))
    torch.testing.assert_close(matvec(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


def test_fusing_does_not_change_the_model() -> None:
    model = make("qkv_bias")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        logits = model(ids)
        FusedDecoder(model)
        # The weights lie elsewhere in memory, and a kernel's order of sums may follow their alignment.
        torch.testing.assert_close(model(ids), logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(model(ids).argmax(-1), logits.argmax(-1))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    attention = model.blocks[0].attn
    assert (
        attention.q_proj.weight.untyped_storage().data_ptr()
        == attention.v_proj.weight.untyped_storage().data_ptr()
    )


def test_a_model_with_unknown_layers_is_not_fused() -> None:
    class Adapted(torch.nn.Linear):
        pass

    model = make("llama")
    assert isinstance(select_runner(model), FusedDecoder)
    model.blocks[1].attn.q_proj = Adapted(32, 32, bias=False)
    assert isinstance(select_runner(model), EagerModelRunner)


def test_the_environment_switches_the_fast_decoder_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model, settings = make("llama"), GenerationConfig(temperature=0, max_new_tokens=20)
    fast = LanguageModel(model)
    assert isinstance(fast._runner, FusedDecoder)
    assert fast._head._is_fast
    monkeypatch.setenv("LLM_TRAINER_CPU_DECODER", "0")
    plain = LanguageModel(make("llama"))
    assert isinstance(plain._runner, EagerModelRunner)
    assert not plain._head._is_fast
    assert plain.generate_ids([[5, 6, 7]], settings) == fast.generate_ids([[5, 6, 7]], settings)
    monkeypatch.setenv("LLM_TRAINER_CPU_DECODER", "off")
    with pytest.raises(UsageError, match="LLM_TRAINER_CPU_DECODER: 'off'"):
        LanguageModel(model)
