"""Four-bit matrices: quantizing again is exact, the error is torchao's, memory is a seventh, and files have
floats.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from model_shapes import small_config
from torch import Tensor

from llm_trainer.config import UsageError
from llm_trainer.model.adapters.lora import train_adapters_only
from llm_trainer.model.adapters.nf4 import copy_into, dequantize, is_quantized, quantize_base, quantize_nf4
from llm_trainer.model.hf.checkpoint import load_pretrained, save_pretrained
from llm_trainer.model.transformer import Transformer

IDS = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(3))
SHAPES = {"gpt2": {}, "llama": {"model_type": "llama", "num_key_value_heads": 2, "intermediate_size": 96}}


def random_values(kind: str, *shape: int) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(len(kind)))
    spread = {
        "normal": values,
        "heavy": values**5,
        "tiny": values * 1e-20,
        "nothing": values * 1e-45,
        "trained": values * 0.02,
    }
    found = spread.get(kind, values)
    if kind == "holes":
        found = torch.where(torch.arange(values.numel()).view(shape) // 64 % 3 == 0, 0.0, values)
    if kind == "uneven":  # blocks a thousand times as large as others in their group
        found = values * torch.logspace(-3, 3, shape[0])[:, None]
    return found


@pytest.mark.parametrize("kind", ["normal", "heavy", "tiny", "nothing", "trained", "holes", "uneven"])
@pytest.mark.parametrize("shape", [(16, 16), (64, 256), (8, 24), (48, 1024)])
def test_quantizing_a_dequantized_matrix_gives_it_back_bit_exactly(kind: str, shape: tuple[int, int]) -> None:
    once = dequantize(quantize_nf4(random_values(kind, *shape)))
    assert once.shape == shape
    assert torch.isfinite(once).all()
    assert torch.equal(dequantize(quantize_nf4(once)), once)


def test_the_error_is_that_of_torchao_whose_matrices_change_when_quantized_again() -> None:
    from torchao.quantization import NF4Tensor

    weight = random_values("trained", 256, 256)
    ours, theirs = (
        dequantize(quantize_nf4(weight)),
        NF4Tensor.from_tensor(weight, 64, 256).get_original_weight(),
    )
    assert (ours - weight).norm() <= 1.02 * (theirs - weight).norm()
    assert not torch.equal(NF4Tensor.from_tensor(theirs, 64, 256).get_original_weight(), theirs)


def quantized_model(**changes: object) -> Transformer:
    model = Transformer(small_config(**{"attn_lora_rank": 2} | changes), torch.Generator().manual_seed(0))
    train_adapters_only(model)
    quantize_base(model)
    return model


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_gradients_equal_those_of_the_dequantized_model(
    shape: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = quantized_model(**SHAPES[shape])
    save_pretrained(model, tmp_path)
    plain = load_pretrained(tmp_path).train()  # the file has floats
    train_adapters_only(plain)
    assert not any(map(is_quantized, plain.parameters()))
    found = []
    for one in (model.train(), plain):
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            logits = one(IDS)
        logits.float().square().sum().backward()
        found.append(
            [
                logits.detach(),
                *(parameter.grad for _, parameter in one.named_parameters() if parameter.requires_grad),
            ]
        )
    assert len(found[0]) > 2
    torch.testing.assert_close(
        *found, rtol=1e-5 if dtype is torch.float32 else 5e-2, atol=1e-5 if dtype is torch.float32 else 5e-2
    )


def test_the_matrices_take_a_seventh_of_their_memory_and_the_rest_is_unchanged() -> None:
    model = quantized_model(hidden_size=256, num_attention_heads=4)
    matrices = [parameter for name, parameter in model.named_parameters() if is_quantized(parameter)]
    assert len(matrices) == 6 * model.config.num_hidden_layers
    num_bytes = sum(getattr(one, inner).nbytes for one in matrices for inner in one.__tensor_flatten__()[0])
    assert num_bytes <= 4 * sum(one.numel() for one in matrices) / 7
    assert model.wte.weight.dtype == torch.float32
    assert not is_quantized(model.wte.weight)


def test_values_copied_into_a_quantized_parameter_are_quantized() -> None:
    weight, other = random_values("normal", 16, 64), random_values("trained", 16, 64)
    parameter = torch.nn.Parameter(quantize_nf4(weight), requires_grad=False)
    copy_into(parameter, other)
    assert torch.equal(dequantize(parameter), dequantize(quantize_nf4(other)))


def test_a_matrix_that_cannot_be_quantized_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"attn\.0\.q_proj is trained"):
        quantize_base(Transformer(small_config()))
    odd = Transformer(
        small_config(intermediate_size=35, hidden_size=32, num_attention_heads=4, attn_lora_rank=1)
    )
    train_adapters_only(odd)
    with pytest.raises(UsageError, match=r"blocks of 64 weights, and mlp\.0\.up_proj has 1120"):
        quantize_base(odd)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UsageError, match=r"pip install 'llm-trainer\[quantize\]'"):
        quantize_nf4(random_values("normal", 16, 16))
