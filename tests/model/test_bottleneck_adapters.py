"""Bottleneck adapters and those of domains: nothing at first, each row its own, the same alone as in a mixed batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_shapes import small_config
from torch import Tensor

from llm_trainer.config import UsageError
from llm_trainer.config.counting import part_sizes
from llm_trainer.inference.fused import is_fusible
from llm_trainer.model.cache import KVCache
from llm_trainer.model.huggingface import load_pretrained, save_pretrained
from llm_trainer.model.lora import is_adapter_parameter
from llm_trainer.model.parts import parameter_counts
from llm_trainer.model.transformer import Transformer

IDS = torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(3))
DOMAINS = {"use_domain_adaptation": True, "adapter_domains": ["math", "law", "code"], "adapter_size": 5}


def model_of(**changes: object) -> Transformer:
    return Transformer(small_config(**changes), torch.Generator().manual_seed(0)).eval()


@torch.no_grad()
def disturbed(model: Transformer) -> Transformer:
    for name, parameter in model.named_parameters():
        if is_adapter_parameter(name):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    return model


@torch.no_grad()
def logits(model: Transformer, ids: Tensor = IDS, names: list[str] | None = None) -> Tensor:
    return model(ids, domains=model.domain_rows(names))


@pytest.mark.parametrize("pre_norm", [True, False])
def test_new_adapters_change_nothing_and_trained_ones_do(pre_norm: bool) -> None:
    plain, model = model_of(pre_norm=pre_norm), model_of(pre_norm=pre_norm, use_adapter_modules=True, **DOMAINS)
    assert torch.equal(logits(model, names=["law", "math", "law"]), logits(plain))
    disturbed(model)
    assert (logits(model) - logits(plain)).abs().max() > 1e-3


def test_each_row_takes_its_domains_adapter_alone_as_in_a_mixed_batch() -> None:
    model = disturbed(model_of(**DOMAINS))
    names = ["code", "math", "law"]
    mixed = logits(model, names=names)
    for row, name in enumerate(names):
        model.use_domain(name)
        torch.testing.assert_close(logits(model, IDS[row : row + 1])[0], mixed[row], rtol=0, atol=1e-5)
        model.use_domain(None)
        assert (logits(model, IDS[row : row + 1])[0] - mixed[row]).abs().max() > 1e-3


def test_a_domains_rows_train_its_adapter_alone() -> None:
    model = disturbed(model_of(**DOMAINS))
    model(IDS, domains=model.domain_rows(["math", "code", "math"])).sum().backward()
    moved = [bool(one.any()) for one in model.blocks[0].domain_adapter.up.grad]
    assert moved == [True, False, True]


def test_decoding_with_a_cache_takes_the_chosen_adapter() -> None:
    model = disturbed(model_of(use_adapter_modules=True, **DOMAINS))
    assert not is_fusible(model)
    model.use_domain("law")
    cache = KVCache(model.config, 3, 12)
    with torch.no_grad():
        pieces = [model(IDS[:, :7], cache=cache), model(IDS[:, 7:], cache=cache)]
    torch.testing.assert_close(torch.cat(pieces, 1), logits(model), rtol=0, atol=1e-5)


def test_recomputation_gives_the_same_gradients_with_domains() -> None:
    gradients = []
    for recomputes in (False, True):
        model = disturbed(model_of(gradient_checkpointing=recomputes, **DOMAINS)).train()
        model(IDS, domains=model.domain_rows(["math", "code", "law"])).square().sum().backward()
        gradients.append(model.blocks[0].domain_adapter.down.grad)
    torch.testing.assert_close(*gradients)


def test_they_survive_a_folder_and_are_counted(tmp_path: Path) -> None:
    model = disturbed(model_of(use_adapter_modules=True, attn_lora_rank=2, **DOMAINS))
    save_pretrained(model, tmp_path)
    read = load_pretrained(tmp_path)
    assert torch.equal(logits(read, names=["law"] * 3), logits(model, names=["law"] * 3))
    assert parameter_counts(model) == part_sizes(model.config)
    assert sum(parameter_counts(model).values()) == sum(parameter.numel() for parameter in model.parameters())


def test_an_unknown_domain_is_refused_with_those_that_are_there() -> None:
    with pytest.raises(UsageError, match="math, law, code"):
        model_of(**DOMAINS).use_domain("poetry")
    with pytest.raises(UsageError, match="none"):
        model_of().use_domain("math")


def test_without_names_the_one_domain_is_called_general() -> None:
    model = disturbed(model_of(use_domain_adaptation=True))
    assert torch.equal(logits(model), logits(model, names=["general"] * 3))
