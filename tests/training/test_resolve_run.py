"""Settings, data and checkpoint are resolved once, into a frozen ResolvedRun, before anything is trained."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_run import CONTEXT, tiny_config, tiny_model, tiny_run, tokens

from llm_trainer.config import CheckpointError, DataConfig, DataError, RunConfig, UsageError
from llm_trainer.config.resolve.batch_size import BatchPlan
from llm_trainer.config.resolve.parallelism import ParallelPlan
from llm_trainer.config.resolve.settings import resolve_settings
from llm_trainer.distributed.process_group import ProcessGroup
from llm_trainer.training.resolve_run import ResolvedRun, resolve_config, resolve_run
from llm_trainer.training.trainer import Trainer


def resolved(config: RunConfig, checkpoint: Path | None = None) -> ResolvedRun:
    settings = resolve_settings(config, ParallelPlan())
    return resolve_run(settings, tokens(), context=CONTEXT, checkpoint=checkpoint)


def test_a_resolved_run_has_batches_length_schedule_and_device(tmp_path: Path) -> None:
    run = resolved(tiny_config(tmp_path))
    assert run.batches == BatchPlan(4, 2)
    assert run.sequences_per_step == 8
    assert (run.length.steps, run.length.tokens_per_step) == (10, 64)
    assert run.length.steps_per_epoch == run.sampler.samples_per_epoch / 8
    assert (run.schedule.warmup_steps, run.schedule.decay_steps) == (2, 10)
    assert run.device == torch.device("cpu")
    assert (run.run_dir, run.checkpoint, run.micro_batch_bounds) == (tmp_path, None, None)


def test_a_length_in_epochs_becomes_steps(tmp_path: Path) -> None:
    run = resolved(tiny_config(tmp_path, max_steps=None, num_epochs=3))
    assert run.length.steps == 15


def test_a_resolved_run_cannot_be_changed(tmp_path: Path) -> None:
    run = resolved(tiny_config(tmp_path))
    with pytest.raises(FrozenInstanceError):
        run.context = 4  # type: ignore[misc]


def test_resolving_changes_no_settings_of_the_caller(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        resume_from="auto",
        micro_batch_size="auto",
        batch_size=8,
        gradient_accumulation_steps=None,
    )
    before = config.model_dump()
    settings, checkpoint = resolve_config(config, ProcessGroup())
    resolve_run(settings, tokens(), context=CONTEXT, checkpoint=checkpoint)
    assert config.model_dump() == before


def test_auto_without_a_checkpoint_is_a_new_run_and_with_one_is_verified(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, resume_from="auto")
    assert resolve_config(config, ProcessGroup())[1] is None
    tiny_run(tmp_path)
    assert resolve_config(config, ProcessGroup())[1] == tmp_path / "final_model"
    (tmp_path / "final_model" / "config.json").write_text("{}", encoding="utf-8")
    lines: list[str] = []
    assert resolve_config(config, ProcessGroup(), lines.append)[1] == tmp_path / "best_model"
    assert any("final_model" in line for line in lines)


def test_a_checkpoint_that_does_not_exist_is_an_error_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        resolve_config(tiny_config(tmp_path, resume_from=str(tmp_path / "none")), ProcessGroup())


def test_a_run_resumes_in_place_from_a_checkpoint_of_its_own_folder_alone(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    assert not resolved(config).resumes_in_place
    assert resolved(config, tmp_path / "run" / "checkpoint-3").resumes_in_place
    assert not resolved(config, tmp_path / "other" / "checkpoint-3").resumes_in_place


def test_data_that_is_too_short_and_an_unknown_device_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fewer than one window"):
        resolve_run(resolve_settings(tiny_config(tmp_path), ParallelPlan()), tokens(5), context=CONTEXT)
    with pytest.raises(UsageError, match="device 'xpu'"):
        resolved(tiny_config(tmp_path, device="xpu"))


def test_a_trainer_accepts_plain_settings_and_a_resolved_run_alike(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "plain")
    run = resolved(tiny_config(tmp_path / "resolved"))
    quiet = Console(quiet=True)
    plain = Trainer(tiny_model(config.model), config, tokens(), console=quiet)
    ready = Trainer(tiny_model(config.model), run, tokens(), console=quiet)
    plain.train()
    ready.train()
    for one, other in zip(plain.model.parameters(), ready.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_data_settings_given_twice_are_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    with pytest.raises(UsageError, match="data_config is given twice"):
        Trainer(tiny_model(config.model), config, tokens(), data_config=DataConfig())
