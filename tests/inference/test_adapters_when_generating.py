"""Generation with adapters by name, from a folder or without any; they are merged, so that the model can be
fused.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm_trainer.config import ModelConfig, UsageError
from llm_trainer.config.schema.lora import LoraConfig
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.inference.cpu.fused_decoder import FusedDecoder, can_fuse
from llm_trainer.inference.load_model import load_model
from llm_trainer.model.adapters.lora import add_adapters, is_adapter_parameter, set_adapters
from llm_trainer.model.hf.checkpoint import save_pretrained
from llm_trainer.model.interop.peft_format import save_adapter
from llm_trainer.model.transformer import Transformer

IDS = torch.tensor([[1, 5, 2, 7]])


@pytest.fixture
def adapted(tmp_path: Path) -> Transformer:
    tokenizer = Tokenizer.train("char", ["abcdefghij"], 20)
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, num_layers=2, num_heads=2, max_position_embeddings=32
    )
    model = Transformer(shape, torch.Generator().manual_seed(0)).eval()
    add_adapters(model, "poetry", LoraConfig(ranks={"attn.0": 2, "mlp.1": 2}))
    add_adapters(model, "law", LoraConfig(ranks={"attn.1": 3}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter_parameter(name):
                parameter.copy_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                )
    save_pretrained(model, tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    return model


@pytest.mark.parametrize("name", ["poetry", "law", "base"])
def test_adapters_are_chosen_by_name_and_merged(adapted: Transformer, name: str, tmp_path: Path) -> None:
    set_adapters(adapted, [] if name == "base" else [name])
    loaded, _ = load_model(tmp_path / "model", device="cpu", adapter=name)
    assert can_fuse(loaded.model)
    assert isinstance(loaded._runner, FusedDecoder)
    torch.testing.assert_close(loaded.model(IDS), adapted(IDS))


def test_adapters_are_loaded_from_a_folder(adapted: Transformer, tmp_path: Path) -> None:
    save_adapter(adapted, tmp_path / "adapter", "law")
    set_adapters(adapted, ["law"])
    loaded, _ = load_model(tmp_path / "model", device="cpu", adapter=str(tmp_path / "adapter"))
    torch.testing.assert_close(loaded.model(IDS), adapted(IDS))


def test_an_unknown_adapter_is_refused_with_the_known_ones(adapted: Transformer, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="poetry, law, base"):
        load_model(tmp_path / "model", device="cpu", adapter="prose")


def test_a_model_with_unmerged_adapters_is_not_fused(adapted: Transformer) -> None:
    assert not can_fuse(adapted)
