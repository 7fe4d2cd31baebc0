"""Several adapters in one run: active ones stay active through an operation, a resume and a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_run import tiny_trainer

from llm_trainer.cli.commands.export_adapter import select_adapter
from llm_trainer.cli.setup.build_model import load_pretrained_model
from llm_trainer.config import ModelConfig, UsageError
from llm_trainer.config.schema.scaling_schedule import Operation
from llm_trainer.diagnostics.verify_resume import StopAtStep, compare_checkpoints
from llm_trainer.inference.load_model import load_transformer
from llm_trainer.model.adapters.lora import active_adapters, is_adapter_parameter, set_adapters
from llm_trainer.model.hf.checkpoint import save_pretrained
from llm_trainer.orchestration.dry_run import dry_run
from llm_trainer.orchestration.orchestrator import Orchestrator
from llm_trainer.orchestration.run_overrides import RunSettings

MINE = {
    "lora": {"mine": {"ranks": {"attn.0": 4, "mlp.1": 2}}, "spare": {"ranks": {"mlp.0": 2}}},
    "active_adapters": ["mine"],
}
SCHEDULE = [Operation(name="set_layer_lora_rank", value=["attn.1", 2], max_wait_iters=4, reevaluate=True)]


def trained(folder: Path, *callbacks: StopAtStep, **settings: object) -> None:
    tiny_trainer(
        folder, model=MINE, callbacks=[Orchestrator(SCHEDULE), *callbacks], learning_rate=3e-2, **settings
    ).train()


def test_an_operation_that_adds_an_adapter_leaves_the_others_active_and_a_resume_restores_them(
    tmp_path: Path,
) -> None:
    trained(tmp_path / "whole")
    (line,) = [
        json.loads(one)
        for one in (tmp_path / "whole/operations.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert line["loss_after"] == pytest.approx(line["loss_before"], abs=1e-6)
    trained(tmp_path / "cut", StopAtStep(6))
    trained(tmp_path / "cut", resume_from="auto")
    assert compare_checkpoints(tmp_path / "whole/final_model", tmp_path / "cut/final_model") == []
    early, late = (load_transformer(tmp_path / "cut" / name) for name in ("checkpoint-6", "final_model"))
    assert active_adapters(late) == ["mine", "default"]
    before = dict(early.named_parameters())
    learned = {
        name
        for name, one in late.named_parameters()
        if ".lora." in name and not torch.equal(one, before[name])
    }
    assert {name.split(".lora.")[1].split(".")[0] for name in learned} == {"mine", "default"}


def test_an_operation_on_an_inactive_adapter_is_refused_before_training() -> None:
    sets = {name: {"ranks": {"attn.0": 2}} for name in ("default", "mine")}
    shape = ModelConfig(
        vocab_size=100, hidden_size=16, num_layers=2, num_heads=2, lora=sets, active_adapters=["mine"]
    )
    with pytest.raises(
        UsageError,
        match=r"entry 1.*set the ranks of the adapter 'default', which is not active; active are: mine",
    ):
        dry_run(SCHEDULE, shape, RunSettings(1e-3, 8, 2, 10, None, 100))


def test_an_adapter_added_to_a_checkpoints_adapter_is_still_active_in_the_next_checkpoint(
    tmp_path: Path,
) -> None:
    trainer = tiny_trainer(tmp_path / "first", model={"attn_lora_rank": 2})
    save_pretrained(trainer.model, tmp_path / "first")
    model = load_pretrained_model(
        str(tmp_path / "first"), ModelConfig(lora={"second": {"ranks": {"mlp.0": 2}}})
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter_parameter(name):
                parameter.add_(0.1)
    save_pretrained(model, tmp_path / "second")
    read = load_transformer(tmp_path / "second")
    assert active_adapters(read) == ["default", "second"]
    ids = torch.arange(8)[None]
    assert torch.equal(read(ids), model(ids))
    with pytest.raises(UsageError, match="several adapters \(default, second\); choose one with --adapter"):
        select_adapter(read, None)
    set_adapters(read, ["second"])
    assert select_adapter(read, None) == "second"
