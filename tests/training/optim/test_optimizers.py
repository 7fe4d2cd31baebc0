"""AdamW and Muon: parameter groups, weight decay on matrices only, and the same results as torch's own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tiny_run import SHAPE, tiny_model
from torch import nn

from llm_trainer.config import ModelConfig, TrainingConfig, UsageError
from llm_trainer.training.optim.muon import BatchedMuon
from llm_trainer.training.optim.optimizers import AdamW, build_optimizers, peak_lrs, set_lrs


def _groups(optimizer: str, **shape: object) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    model = tiny_model(ModelConfig(**SHAPE | shape))
    return model, build_optimizers(model, TrainingConfig(optimizer=optimizer, weight_decay=0.3))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(optimizer: str, tied: bool) -> None:
    model, optimizers = _groups(optimizer, tie_word_embeddings=tied, model_type="llama", bias=True)
    grouped = [
        (id(p), p.ndim, group["weight_decay"])
        for o in optimizers
        for group in o.param_groups
        for p in group["params"]
    ]
    assert sorted(number for number, _, _ in grouped) == sorted(id(p) for p in model.parameters())
    assert {(ndim, decay) for _, ndim, decay in grouped} == {(1, 0.0), (2, 0.3)}


def test_muon_gets_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    model, (muon, adamw) = _groups("muon")
    names = {id(p): name for name, p in model.named_parameters()}
    of_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert of_muon == {
        name for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2
    }
    assert {"wte.weight", "wpe.weight", "ln_f.weight"} <= {
        names[id(p)] for group in adamw.param_groups for p in group["params"]
    }


def test_frozen_parameters_are_left_out_and_a_frozen_model_is_refused() -> None:
    model = tiny_model(ModelConfig(**SHAPE))
    model.wte.weight.requires_grad_(False)
    (optimizer,) = build_optimizers(model, TrainingConfig())
    assert all(p is not model.wte.weight for group in optimizer.param_groups for p in group["params"])
    model.requires_grad_(False)
    with pytest.raises(UsageError, match="nothing to train"):
        build_optimizers(model, TrainingConfig())


def test_the_learning_rate_of_a_group_is_its_peak_times_the_factor() -> None:
    _, optimizers = _groups("muon")
    peaks = peak_lrs(optimizers)
    assert peaks == [[0.02], [3e-4, 3e-4]]
    for factor in (0.5, 0.25):  # of the peak, not of the last rate
        set_lrs(optimizers, peaks, factor)
    assert peak_lrs(optimizers) == [[0.005], [7.5e-5, 7.5e-5]]


SIZES = [(32, 32)] * 3 + [(48, 16)] * 2 + [(16, 48)] * 2 + [(400, 400), (16, 16)]


def _matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=generator) * 0.1) for size in SIZES]


def _steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], count: int = 4) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_batched_muon_equals_torchs_muon(adjust: str | None, nesterov: bool) -> None:
    mine, reference = _matrices(), _matrices()
    _steps(BatchedMuon(mine, lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust, nesterov=nesterov), mine)
    _steps(
        torch.optim.Muon(reference, lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust, nesterov=nesterov),
        reference,
    )
    for one, other in zip(mine, reference, strict=True):
        # Bit-equal on the machines tried; bf16 products may sum in another order elsewhere: 2⁻⁸ of 4
        # updates of about 0.02 each.
        torch.testing.assert_close(one, other, rtol=0, atol=2**-8 * 4 * 0.02 * 5)


def test_adamw_equals_torchs_adamw() -> None:
    mine, reference = _matrices(), _matrices()
    _steps(AdamW(mine, lr=0.01, fused=True), mine)
    _steps(torch.optim.AdamW(reference, lr=0.01, fused=True), reference)
    assert all(torch.equal(one, other) for one, other in zip(mine, reference, strict=True))


@pytest.mark.parametrize("kind", [AdamW, BatchedMuon])
def test_a_step_with_gradients_that_are_not_finite_changes_neither_weights_nor_state(
    kind: type[torch.optim.Optimizer],
) -> None:
    parameters = _matrices()
    optimizer = kind(parameters, lr=0.01, **({"fused": True} if kind is AdamW else {}))
    _steps(optimizer, parameters, 1)
    before = [p.detach().clone() for p in parameters] + [
        v.clone() for s in optimizer.state.values() for v in s.values()
    ]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    after = [*parameters, *(v for s in optimizer.state.values() for v in s.values())]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.slow
def test_an_eager_run_does_not_import_the_compiler() -> None:
    program = """
import sys, torch
from llm_trainer.config import ModelConfig, TrainingConfig
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.optim.optimizers import build_optimizers
model = Transformer(ModelConfig(vocab_size=8, hidden_size=8, num_layers=1, num_heads=1, max_seq_len=4))
model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
for optimizer in build_optimizers(model, TrainingConfig(optimizer="muon")):
    optimizer.step(); optimizer.zero_grad()
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
