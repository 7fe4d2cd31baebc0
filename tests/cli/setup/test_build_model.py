"""Adapters that were said for a model that has some: the same ones are gone on with, other ones refused,
others beside them added.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llm_trainer.cli.main import main
from llm_trainer.cli.setup.build_model import load_pretrained_model, pretrained_model_config
from llm_trainer.config import ModelConfig, UsageError
from llm_trainer.model.adapters.lora import is_adapter_parameter
from llm_trainer.model.hf.checkpoint import save_pretrained
from llm_trainer.model.interop.peft_format import save_adapter
from llm_trainer.model.transformer import Transformer

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
}
LORA = {"attn_lora_rank": 4, "embedding_lora_rank": 2, "lora_dropout": 0.1}
TRAIN = ["train", "--data_dir=data/prepared/text", "--batch_size=4", "--max_steps=2", "--compile=off"]
SHAPE = ["--hidden_size=32", "--num_layers=2", "--num_heads=4"]
DOMAINS = ["--use_domain_adaptation=true", "--adapter_domains=math,law"]


def saved(folder: Path, **changes: object) -> Transformer:
    model = Transformer(ModelConfig(**SMALL | changes), torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter_parameter(name):
                parameter.copy_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2
                )
    save_pretrained(model, folder)
    return model


def logits(model: Transformer) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(12)[None])


@pytest.mark.parametrize(
    "said",
    [
        {},
        LORA,
        {"lora_alpha": None, "attn_lora_rank": 4},
        {"head_lora_rank": 0, "embedding_lora_rank": 2},
        {"lora": {"default": {"ranks": {"attn.0": 4, "attn.1": 4, "lm_head": 2}, "dropout": 0.1}}},
        {"mlp_lora_rank": 0, "use_rslora": False},
        {"lora": {"second": {"ranks": {"mlp.0": 3}}}},
    ],
)
def test_the_low_rank_adapters_that_are_there_are_gone_on_with(
    said: dict[str, object], tmp_path: Path
) -> None:
    model = saved(tmp_path, **LORA)
    read = load_pretrained_model(str(tmp_path), ModelConfig(**said))
    assert torch.equal(logits(read), logits(model))
    assert read.config.lora["default"] == model.config.lora["default"]
    assert pretrained_model_config(str(tmp_path), ModelConfig(**said)).lora == read.config.lora


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (
            {"attn_lora_rank": 16},
            "attn_lora_rank is set to 16, but the adapter 'default' of the weights has 4",
        ),
        ({"mlp_lora_rank": 8}, "mlp_lora_rank is set to 8, but the adapter 'default' of the weights has 0"),
        ({"attn_lora_rank": 0}, "attn_lora_rank is set to 0,"),
        ({"head_lora_rank": 3}, "head_lora_rank is set to 3, .* has 2"),
        ({"lora_alpha": 64.0}, "lora_alpha is set to 64.0, .* has 4, 8"),
        ({"lora_dropout": 0.5}, "lora_dropout is set to 0.5, .* has 0.1"),
        ({"use_rslora": True}, "use_rslora is set to True,"),
        (
            {"lora": {"default": {"ranks": {"attn.0": 4}}}},
            "model.lora.default is set to .* is different; .* give a new adapter another name",
        ),
    ],
)
@pytest.mark.parametrize("place", ["checkpoint", "folder"])
def test_low_rank_adapters_other_than_those_that_are_there_are_refused(
    said: dict[str, object], why: str, place: str, tmp_path: Path
) -> None:
    model = saved(tmp_path / "with", **LORA)
    saved(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter")
    source, adapter = (
        (tmp_path / "with", None) if place == "checkpoint" else (tmp_path / "base", str(tmp_path / "adapter"))
    )
    with pytest.raises(UsageError, match=why):
        load_pretrained_model(str(source), ModelConfig(**said), adapter=adapter)


def test_bottleneck_adapters_are_added_beside_others_and_other_ones_refused(tmp_path: Path) -> None:
    model = saved(tmp_path, use_adapter_modules=True, adapter_size=8)
    beside = load_pretrained_model(str(tmp_path), ModelConfig(use_domain_adaptation=True), ["math", "law"])
    assert (beside.config.domain_names, beside.config.use_adapter_modules, beside.config.adapter_size) == (
        ["math", "law"],
        True,
        8,
    )
    assert torch.equal(logits(beside), logits(model))
    save_pretrained(beside, tmp_path / "both")
    assert load_pretrained_model(
        str(tmp_path / "both"), ModelConfig(use_adapter_modules=True, adapter_size=8)
    ).config.adapter_domains
    refused = [
        (
            tmp_path,
            {"adapter_size": 4},
            "adapter_size is set to 4, but the bottleneck adapters of the weights have 8",
        ),
        (tmp_path, {"use_domain_adaptation": True, "adapter_size": 4}, "adapter_size is set to 4,"),
        (tmp_path, {"use_adapter_modules": False}, "use_adapter_modules is set to False"),
        (
            tmp_path / "both",
            {"use_domain_adaptation": True, "adapter_domains": ["code"]},
            r"adapter_domains is set to \['code'\], .* \['math', 'law'\]",
        ),
    ]
    for folder, said, why in refused:
        with pytest.raises(UsageError, match=why):
            load_pretrained_model(str(folder), ModelConfig(**said))


def test_adapters_of_several_domains_want_data_that_tells_them_apart(
    place: Path, fails: Callable[..., str]
) -> None:
    for start in (SHAPE, ["--init_from=checkpoints/final_model"]):
        said = fails(*TRAIN, *start, *DOMAINS, "--output_dir=new", status=2)
        assert "the model has adapters for math, law, but the data has no domain labels" in said
    assert not (place / "new").exists()
    assert main([*TRAIN, *SHAPE, *DOMAINS, "--freeze_layers=domain_adapter.*", "--output_dir=frozen"]) == 0
    assert main([*TRAIN, *SHAPE, "--use_domain_adaptation=true", "--output_dir=general"]) == 0
    mixture = {"members": {"math": "prepared/text", "law": "prepared/text"}, "weights": {"math": 1, "law": 1}}
    (place / "data/mixture.json").write_text(json.dumps(mixture), encoding="utf-8")
    mixed = [one if not one.startswith("--data_dir") else "--data_dir=data" for one in TRAIN]
    assert main([*mixed, *DOMAINS, "--init_from=checkpoints/final_model", "--output_dir=mixed"]) == 0
    assert main(["verify-resume", "mixed", "--steps=2"]) == 0


@pytest.mark.parametrize(("rows", "reported"), [(300, False), (384, False), (3000, True)])
def test_a_vocabulary_far_larger_than_the_tokenizer_is_reported_with_its_cost(
    place: Path, capsys: pytest.CaptureFixture[str], rows: int, reported: bool
) -> None:
    arguments = [*TRAIN, *SHAPE, "--max_length=32", f"--vocab_size={rows}"]
    assert main([*arguments, "--tie_word_embeddings=true", "--output_dir=large"]) == 0
    printed = capsys.readouterr().out
    line = "the tokenizer has 300 ids: 86,400 parameters are never used, which cost 0.0014 GB"
    assert (line in printed) == reported
    assert ("never used" in printed) == reported
