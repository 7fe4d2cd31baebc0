"""Offloaded optimizer state gives the same updates, a few parameters at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_run import tiny_config, tiny_model

from llm_trainer.training.optim.optimizer_offload import step_offloaded
from llm_trainer.training.optim.optimizers import build_optimizers

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_updates_in_chunks_equal_an_update_of_all_parameters(tmp_path: Path, kind: str, device: str) -> None:
    config = tiny_config(tmp_path, optimizer=kind)
    models = [tiny_model(config.model).to(device) for _ in range(2)]
    optimizers = [build_optimizers(model, config.training) for model in models]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=generator).to(device)
            other.grad = one.grad.clone()
        for plain, offloaded in zip(*optimizers, strict=True):
            groups = offloaded.param_groups
            plain.step()
            step_offloaded(offloaded, max_bytes=2000)
            assert offloaded.param_groups is groups
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0 if kind == "adamw" else 1e-6)
    for optimizer in optimizers[1]:
        moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
        assert moments
        assert {value.device.type for value in moments} == {"cpu"}
