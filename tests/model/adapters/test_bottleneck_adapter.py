"""Bottleneck adapters and domain adapters: new ones change nothing, each row takes its own, alone as in a
mixed batch.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_shapes import small_config
from torch import Tensor

from llm_trainer.config import UsageError
from llm_trainer.config.param_count import params_per_module
from llm_trainer.inference.cpu.fused_decoder import can_fuse
from llm_trainer.model.adapters.lora import is_adapter_parameter
from llm_trainer.model.hf.checkpoint import load_pretrained, save_pretrained
from llm_trainer.model.kv_cache import KVCache
from llm_trainer.model.module_names import parameter_counts
from llm_trainer.model.transformer import Transformer

IDS = torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(3))
DOMAINS = {"use_domain_adaptation": True, "adapter_domains": ["math", "law", "code"], "adapter_size": 5}


def model_of(**changes: object) -> Transformer:
    return Transformer(small_config(**changes), torch.Generator().manual_seed(0)).eval()


@torch.no_grad()
def randomized(model: Transformer) -> Transformer:
    """The model with random adapters, which change what it computes."""
    for name, parameter in model.named_parameters():
        if is_adapter_parameter(name):
            parameter.copy_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3
            )
    return model


@torch.no_grad()
def logits(model: Transformer, ids: Tensor = IDS, names: list[str] | None = None) -> Tensor:
    return model(ids, domains=model.domain_indices(names))


@pytest.mark.parametrize("pre_norm", [True, False])
def test_new_adapters_change_nothing_and_trained_ones_do(pre_norm: bool) -> None:
    plain, model = (
        model_of(pre_norm=pre_norm),
        model_of(pre_norm=pre_norm, use_adapter_modules=True, **DOMAINS),
    )
    assert torch.equal(logits(model, names=["law", "math", "law"]), logits(plain))
    randomized(model)
    assert (logits(model) - logits(plain)).abs().max() > 1e-3


def test_each_row_takes_its_domains_adapter_alone_as_in_a_mixed_batch() -> None:
    model = randomized(model_of(**DOMAINS))
    names = ["code", "math", "law"]
    mixed = logits(model, names=names)
    for row, name in enumerate(names):
        model.set_domain(name)
        torch.testing.assert_close(logits(model, IDS[row : row + 1])[0], mixed[row], rtol=0, atol=1e-5)
        model.set_domain(None)
        assert (logits(model, IDS[row : row + 1])[0] - mixed[row]).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [{}, {"model_type": "llama", "sliding_window": 3}])
@pytest.mark.parametrize("recompute", [False, True])
def test_documents_packed_in_a_row_have_the_logits_and_gradients_of_documents_alone(
    shape: dict[str, object], recompute: bool
) -> None:
    lengths, names = [3, 4, 5], ["code", "law", "math"]
    domains = model_of(**DOMAINS).config.domain_names
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).expand(3, -1)
    numbers = torch.tensor(
        [[1, 0, 2], [0, 2, 2], [2, 1, 1]]
    )  # which of `names` each row's documents are from
    found = []
    for packed in (True, False):
        model = randomized(model_of(**DOMAINS, gradient_checkpointing=recompute, **shape)).train()
        if packed:
            per_token = numbers.repeat_interleave(torch.tensor(lengths), dim=1)
            out = model(IDS, document_ids=documents, domains=model.domain_indices(names, per_token))
        else:
            rows = []
            for row in range(3):
                chunks = [
                    model(chunk[None], domains=model.domain_indices([names[number]]))
                    for chunk, number in zip(IDS[row].split(lengths), numbers[row].tolist(), strict=True)
                ]
                rows.append(torch.cat(chunks, 1))
            out = torch.cat(rows)
        out.square().sum().backward()
        found.append((out.detach(), [parameter.grad for parameter in model.parameters()]))
    assert len(domains) == 3
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_tokens_of_an_unknown_domain_take_no_adapter_and_such_rows_are_refused() -> None:
    model = randomized(model_of(**DOMAINS))
    per_token = model.domain_indices(["poetry", "law"], torch.tensor([[0] * 12, [1] * 12, [0] * 12]))
    with torch.no_grad():
        mixed = model(IDS, domains=per_token)
    torch.testing.assert_close(mixed[[0, 2]], logits(model)[[0, 2]])
    torch.testing.assert_close(mixed[1], logits(model, names=["law"] * 3)[1], rtol=0, atol=1e-5)
    with pytest.raises(UsageError, match="poetry"):
        model.domain_indices(["poetry", "law"], torch.tensor([1, 0, 1]))


def test_a_domains_rows_train_its_adapter_alone() -> None:
    model = randomized(model_of(**DOMAINS))
    model(IDS, domains=model.domain_indices(["math", "code", "math"])).sum().backward()
    has_gradient = [bool(one.any()) for one in model.blocks[0].domain_adapter.up.grad]
    assert has_gradient == [True, False, True]


def test_decoding_with_a_cache_takes_the_chosen_adapter() -> None:
    model = randomized(model_of(use_adapter_modules=True, **DOMAINS))
    assert not can_fuse(model)
    model.set_domain("law")
    cache = KVCache(model.config, 3, 12)
    with torch.no_grad():
        chunks = [model(IDS[:, :7], cache=cache), model(IDS[:, 7:], cache=cache)]
    torch.testing.assert_close(torch.cat(chunks, 1), logits(model), rtol=0, atol=1e-5)


def test_activation_checkpointing_gives_the_same_gradients_with_domains() -> None:
    gradients = []
    for recompute in (False, True):
        model = randomized(model_of(gradient_checkpointing=recompute, **DOMAINS)).train()
        model(IDS, domains=model.domain_indices(["math", "code", "law"])).square().sum().backward()
        gradients.append(model.blocks[0].domain_adapter.down.grad)
    torch.testing.assert_close(*gradients)


def test_adapters_are_saved_loaded_and_counted(tmp_path: Path) -> None:
    model = randomized(model_of(use_adapter_modules=True, attn_lora_rank=2, **DOMAINS))
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert torch.equal(logits(loaded, names=["law"] * 3), logits(model, names=["law"] * 3))
    assert parameter_counts(model) == params_per_module(model.config)
    assert sum(parameter_counts(model).values()) == sum(parameter.numel() for parameter in model.parameters())


def test_an_unknown_domain_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="math, law, code"):
        model_of(**DOMAINS).set_domain("poetry")
    with pytest.raises(UsageError, match="none"):
        model_of().set_domain("math")


def test_without_names_the_one_domain_is_called_general() -> None:
    model = randomized(model_of(use_domain_adaptation=True))
    assert torch.equal(logits(model), logits(model, names=["general"] * 3))
