"""Four-bit matrices: quantised twice they are what they were, as near as torchao's own, an eighth of the
memory, and floats in a file.
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
from llm_trainer.model.adapters.nf4 import dequantized, fill, is_quantized, quantize_blocks, quantized
from llm_trainer.model.hf.checkpoint import load_pretrained, save_pretrained
from llm_trainer.model.transformer import Transformer

IDS = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(3))
SHAPES = {"gpt2": {}, "llama": {"model_type": "llama", "num_key_value_heads": 2, "intermediate_size": 96}}


def drawn(kind: str, *shape: int) -> Tensor:
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
    if kind == "uneven":  # blocks a thousand times as large as others of their group
        found = values * torch.logspace(-3, 3, shape[0])[:, None]
    return found


@pytest.mark.parametrize("kind", ["normal", "heavy", "tiny", "nothing", "trained", "holes", "uneven"])
@pytest.mark.parametrize("shape", [(16, 16), (64, 256), (8, 24), (48, 1024)])
def test_quantised_again_it_is_the_same_to_the_bit(kind: str, shape: tuple[int, int]) -> None:
    once = dequantized(quantized(drawn(kind, *shape)))
    assert once.shape == shape
    assert torch.isfinite(once).all()
    assert torch.equal(dequantized(quantized(once)), once)


def test_it_is_as_near_as_torchaos_own_which_changes_when_quantised_again() -> None:
    from torchao.quantization import NF4Tensor

    weight = drawn("trained", 256, 256)
    ours, theirs = (
        dequantized(quantized(weight)),
        NF4Tensor.from_tensor(weight, 64, 256).get_original_weight(),
    )
    assert (ours - weight).norm() <= 1.02 * (theirs - weight).norm()
    assert not torch.equal(NF4Tensor.from_tensor(theirs, 64, 256).get_original_weight(), theirs)


def of_four_bits(**changes: object) -> Transformer:
    model = Transformer(small_config(**{"attn_lora_rank": 2} | changes), torch.Generator().manual_seed(0))
    train_adapters_only(model)
    quantize_blocks(model)
    return model


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_gradients_are_those_of_the_floats(
    shape: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = of_four_bits(**SHAPES[shape])
    save_pretrained(model, tmp_path)
    plain = load_pretrained(tmp_path).train()  # the file holds floats
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


def test_the_matrices_take_a_seventh_of_their_memory_and_all_else_stays() -> None:
    model = of_four_bits(hidden_size=256, num_attention_heads=4)
    matrices = [parameter for name, parameter in model.named_parameters() if is_quantized(parameter)]
    assert len(matrices) == 6 * model.config.num_hidden_layers
    held = sum(getattr(one, inner).nbytes for one in matrices for inner in one.__tensor_flatten__()[0])
    assert held <= 4 * sum(one.numel() for one in matrices) / 7
    assert model.wte.weight.dtype == torch.float32
    assert not is_quantized(model.wte.weight)


def test_what_is_put_into_one_is_quantised_as_at_first() -> None:
    weight, other = drawn("normal", 16, 64), drawn("trained", 16, 64)
    held = torch.nn.Parameter(quantized(weight), requires_grad=False)
    fill(held, other)
    assert torch.equal(dequantized(held), dequantized(quantized(other)))


def test_what_cannot_be_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"attn\.0\.q_proj is"):
        quantize_blocks(Transformer(small_config()))
    odd = Transformer(
        small_config(intermediate_size=35, hidden_size=32, num_attention_heads=4, attn_lora_rank=1)
    )
    train_adapters_only(odd)
    with pytest.raises(UsageError, match=r"blocks of 64 weights, and mlp\.0\.up_proj has 1120"):
        quantize_blocks(odd)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UsageError, match=r"pip install 'llm-trainer\[quantize\]'"):
        quantized(drawn("normal", 16, 16))
