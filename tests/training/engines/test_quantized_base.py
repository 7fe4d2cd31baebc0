"""QLoRA: the quantized base never changes, the run resumes bit-exactly, and its checkpoint is a plain
model.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_run import tiny_config, tiny_model, tokens

from llm_trainer.config import UsageError
from llm_trainer.config.resolve.batch_size import BatchPlan
from llm_trainer.config.resolve.parallelism import ParallelPlan, check_plan
from llm_trainer.config.schema.scaling_schedule import Operation
from llm_trainer.diagnostics.verify_resume import compare_checkpoints
from llm_trainer.model.adapters.lora import is_adapter_parameter, merge_lora
from llm_trainer.model.adapters.nf4 import dequantize, is_quantized
from llm_trainer.model.hf.checkpoint import load_pretrained
from llm_trainer.orchestration.orchestrator import dry_run_schedule
from llm_trainer.training.checkpoint.snapshot import CheckpointData, HostBuffers, take_snapshot
from llm_trainer.training.logging.metrics import read_metrics
from llm_trainer.training.memory.memory_estimator import MemoryTracker
from llm_trainer.training.trainer import Trainer

LORA = {"attn_lora_rank": 4, "mlp_lora_rank": 4, "lora_train_base": False}


def a_trainer(folder: Path, dropout: float = 0.1, **settings: object) -> Trainer:
    config = tiny_config(
        folder, LORA | {"dropout": dropout}, **{"quantize_base": "nf4", "learning_rate": 3e-2} | settings
    )
    return Trainer(
        tiny_model(config.model), config, tokens(), tokens(65, seed=1), console=Console(quiet=True)
    )


def base_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {
        name: dequantize(parameter.detach()).clone()
        for name, parameter in named
        if not is_adapter_parameter(name)
    }


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


def test_adapters_learn_over_a_base_that_stays_bit_exact(tmp_path: Path) -> None:
    trainer = a_trainer(tmp_path / "nf4")
    assert sum(map(is_quantized, trainer.model.parameters())) == 2 * 6
    before = base_of(trainer.model)
    trainer.train()
    after = base_of(trainer.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    a_trainer(tmp_path / "floats", quantize_base="off").train()
    assert losses(tmp_path / "nf4")[-1] < losses(tmp_path / "nf4")[0]
    assert losses(tmp_path / "nf4") == pytest.approx(losses(tmp_path / "floats"), rel=0.02)
    assert losses(tmp_path / "nf4") != losses(tmp_path / "floats")


@pytest.mark.parametrize("step", [3, 6])
def test_a_quantized_run_resumes_bit_exactly(tmp_path: Path, step: int) -> None:
    a_trainer(tmp_path / "straight", save_total_limit=None).train()
    a_trainer(tmp_path / "resumed", resume_from=str(tmp_path / "straight" / f"checkpoint-{step}")).train()
    assert compare_checkpoints(tmp_path / "straight/final_model", tmp_path / "resumed/final_model") == []


def test_its_checkpoint_is_a_plain_model_with_its_logits_and_merges(tmp_path: Path) -> None:
    trainer = a_trainer(tmp_path)
    trainer.train()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        wanted = trainer.model.eval()(ids)
        plain = load_pretrained(tmp_path / "final_model")
        assert not any(map(is_quantized, plain.parameters()))
        assert torch.equal(plain(ids), wanted)
        merge_lora(plain, restart=False)
        torch.testing.assert_close(plain(ids), wanted, rtol=0, atol=1e-5)


class FloatsAlive(MemoryTracker):
    """Counts bytes of plain tensors: quantized ones only seem to have storage."""

    def _record(self, tensor: torch.Tensor) -> None:
        if not is_quantized(tensor):
            super()._record(tensor)


@pytest.mark.parametrize("in_background", [False, True])
def test_a_save_dequantizes_one_matrix_of_the_base_at_a_time(tmp_path: Path, in_background: bool) -> None:
    pytest.importorskip("torchao")
    config = tiny_config(tmp_path, LORA | {"hidden_size": 64, "num_layers": 12}, quantize_base="nf4")
    trainer = Trainer(tiny_model(config.model), config, tokens(), console=Console(quiet=True))
    model, buffers = trainer.model, HostBuffers() if in_background else None
    data = CheckpointData(model, [], {"step": 1}, config, None)
    with FloatsAlive() as alive:
        snapshot = take_snapshot(data, 1, buffers)
    floats = sum(parameter.nbytes for parameter in model.parameters())
    in_copies = floats if in_background else 0
    assert max(alive.moments.values(), default=0) < in_copies + floats / 3
    (tmp_path / "written").mkdir()
    snapshot.write(tmp_path / "written")
    (tmp_path / "written/config.json").write_text(snapshot.text_files["config.json"], encoding="utf-8")
    written = dict(load_pretrained(tmp_path / "written").named_parameters())
    assert all(
        torch.equal(written[name], dequantize(parameter)) for name, parameter in model.named_parameters()
    )


def test_it_trains_in_bf16(tmp_path: Path) -> None:
    a_trainer(tmp_path, precision="bf16").train()
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


@pytest.mark.slow
def test_it_trains_compiled(tmp_path: Path) -> None:
    compiled = a_trainer(tmp_path / "compiled", 0.0, compile="on")
    compiled.train()
    a_trainer(tmp_path / "eager", 0.0).train()  # compiled dropout draws other numbers
    assert compiled.run.state.compile != "off"
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)


def test_unsupported_combinations_are_refused_before_training(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, LORA, quantize_base="nf4")
    with pytest.raises(UsageError, match="quantize_base nf4 is not supported with 2 ranks"):
        check_plan(ParallelPlan(data_parallel=2), BatchPlan(4, 1), config.training, config.model)
    trained = tiny_config(tmp_path, LORA | {"lora_train_base": True}, quantize_base="nf4")
    with pytest.raises(UsageError, match="quantize_base needs frozen weights"):
        Trainer(tiny_model(trained.model), trained, tokens(), console=Console(quiet=True))
    trainer = a_trainer(tmp_path)
    with pytest.raises(UsageError, match=r"entry 1 .*quantize_base cannot be combined"):
        dry_run_schedule([Operation(name="widen_mlp", value=96, max_wait_iters=1)], trainer.run)
    assert len(dry_run_schedule([Operation(name="change_lr", value=0.5, max_wait_iters=1)], trainer.run)) == 2
