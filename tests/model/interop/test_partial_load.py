"""Loading the weights of another model that fit, with a report of what was loaded and what was not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_shapes import small_config

from llm_trainer.config import CheckpointError, UsageError
from llm_trainer.model.hf.checkpoint import load_pretrained, save_pretrained
from llm_trainer.model.interop.partial_load import load_partially
from llm_trainer.model.transformer import Transformer


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_pretrained(Transformer(small_config(), torch.Generator().manual_seed(7)), tmp_path / "source")
    return tmp_path / "source"


def test_a_deeper_model_with_another_vocabulary_loads_what_fits_and_reports_the_rest(source: Path) -> None:
    model = Transformer(
        small_config(num_hidden_layers=3, vocab_size=70, attn_lora_rank=2), torch.Generator().manual_seed(0)
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    report = load_partially(model, source)
    available = dict(load_pretrained(source).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, available[name] if name in report.loaded else before[name]), name
    assert report.skipped["wte.weight"] == "shape (61, 32) in the source, (70, 32) in the model"
    assert report.skipped["blocks.2.mlp.up_proj.weight"] == "missing in the source"
    assert report.skipped["blocks.0.attn.q_proj.lora.default.a"] == "missing in the source"
    assert set(report.loaded) | set(report.skipped) == set(before)
    assert report.unused == ("wte.weight",)
    text = "\n".join(report.lines())
    assert "attn.1" in text
    assert "unused tensors of the source: wte.weight" in text


def test_only_the_selected_parts_are_loaded(source: Path) -> None:
    report = load_partially(Transformer(small_config()), source, ["attn.0", "ln_*"])
    assert {name.split(".")[2] if name.startswith("blocks") else name for name in report.loaded} == {
        "attn",
        "ln_1",
        "ln_2",
        "ln_f.weight",
        "ln_f.bias",
    }
    with pytest.raises(UsageError, match=r"attn\.9"):
        load_partially(Transformer(small_config()), source, "attn.9")


def test_a_source_without_a_fitting_tensor_is_an_error(source: Path) -> None:
    message = r"fits this model: wte\.weight \(shape .* change the model's shape"
    with pytest.raises(CheckpointError, match=message):
        load_partially(Transformer(small_config(hidden_size=64, max_position_embeddings=50)), source)
