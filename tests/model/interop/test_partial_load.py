"""Taking what fits of another model's weights, with a report of all that was and was not taken."""

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


def test_a_deeper_model_with_another_vocabulary_takes_what_fits_and_tells_the_rest(source: Path) -> None:
    model = Transformer(
        small_config(num_hidden_layers=3, vocab_size=70, attn_lora_rank=2), torch.Generator().manual_seed(0)
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    report = load_partially(model, source)
    there = dict(load_pretrained(source).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, there[name] if name in report.taken else before[name]), name
    assert report.kept["wte.weight"] == "(61, 32) there and (70, 32) here"
    assert report.kept["blocks.2.mlp.up_proj.weight"] == "not in the source"
    assert report.kept["blocks.0.attn.q_proj.lora.default.a"] == "not in the source"
    assert set(report.taken) | set(report.kept) == set(before)
    assert report.unused == ("wte.weight",)
    text = "\n".join(report.lines())
    assert "attn.1" in text
    assert "not needed: wte.weight" in text


def test_only_the_parts_that_were_asked_for_are_taken(source: Path) -> None:
    report = load_partially(Transformer(small_config()), source, ["attn.0", "ln_*"])
    assert {name.split(".")[2] if name.startswith("blocks") else name for name in report.taken} == {
        "attn",
        "ln_1",
        "ln_2",
        "ln_f.weight",
        "ln_f.bias",
    }
    with pytest.raises(UsageError, match=r"attn\.9"):
        load_partially(Transformer(small_config()), source, "attn.9")


def test_a_source_of_which_nothing_fits_is_an_error(source: Path) -> None:
    with pytest.raises(CheckpointError, match="fits"):
        load_partially(Transformer(small_config(hidden_size=64, max_position_embeddings=50)), source)
