"""What a pipeline's schedule cannot run is refused: in the settings, in a scaling schedule, and when a run
changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from rich.console import Console
from tiny_run import tiny_config, tiny_model, tokens
from torch.testing._internal.distributed.fake_pg import FakeStore

from llm_trainer.config import RunConfig, UsageError
from llm_trainer.config.parse.validation import check_complete
from llm_trainer.config.resolve.batch_size import BatchPlan
from llm_trainer.config.resolve.parallelism import ParallelPlan
from llm_trainer.config.resolve.settings import resolve_settings
from llm_trainer.config.schema.scaling_schedule import Operation
from llm_trainer.distributed.process_group import ProcessGroup
from llm_trainer.orchestration.orchestrator import dry_run_schedule
from llm_trainer.orchestration.run_overrides import fit_batch_size
from llm_trainer.training.trainer import Trainer


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    """The first of two ranks with two stages each, the other of which is pretended: no step is run here."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    config = tiny_config(tmp_path, {"num_layers": 4}, pipeline_parallel=2, pipeline_schedule="interleaved")
    process_group = ProcessGroup(0, 2, ParallelPlan(pipeline_parallel=2))
    yield Trainer(
        tiny_model(config.model), config, tokens(), console=Console(quiet=True), process_group=process_group
    )
    dist.destroy_process_group()


def entry(name: str, value: float) -> Operation:
    return Operation(name=name, value=value, max_wait_iters=1)


@pytest.mark.parametrize(
    "operations",
    [[entry("set_grad_accum", 5)], [entry("set_batch_size", 3), entry("change_grad_accum", 2.5)]],
)
def test_an_entry_whose_micro_batches_the_stages_cannot_schedule_is_refused_before_training(
    trainer: Trainer, operations: list[Operation]
) -> None:
    with pytest.raises(
        UsageError, match=rf"entry {len(operations)} .*5 micro-batches are not divisible by 2; use 4 or 6"
    ):
        dry_run_schedule(operations, trainer.run)
    assert (
        len(
            dry_run_schedule(
                [entry("set_grad_accum", 6), entry("change_grad_accum", 0.5), entry("set_batch_size", 5)],
                trainer.run,
            )
        )
        == 4
    )


def test_batches_set_by_a_checkpoint_or_an_operation_are_checked(
    trainer: Trainer,
) -> None:
    with pytest.raises(UsageError, match="5 micro-batches are not divisible by 2; use 4 or 6"):
        trainer.run.set_batches(BatchPlan(1, 5))


def test_no_micro_batch_size_is_searched_for_in_a_pipeline(trainer: Trainer) -> None:
    with pytest.raises(UsageError, match="not supported with pipeline_parallel"):
        trainer.run.largest_micro_batch()
    assert fit_batch_size(trainer.run, None) == BatchPlan(4, 2)


def test_fp16_from_a_checkpoint_is_refused_before_the_first_step(trainer: Trainer) -> None:
    with pytest.raises(UsageError, match="precision fp16 is not supported with pipeline_parallel 2"):
        trainer.run.engine.start("fp16", "off")


@pytest.mark.parametrize(
    "settings",
    [
        {"training": {"micro_batch_size": "auto"}},
        {
            "training": {"use_computational_efficiency": True},
            "computational_efficiency": {"use_adaptive_batch_size": True},
        },
    ],
)
def test_micro_batch_size_auto_is_not_supported_with_stages(settings: dict[str, dict[str, object]]) -> None:
    config = RunConfig.model_validate(settings)
    check_complete(resolve_settings(config, ParallelPlan()), {}, {"training"})
    config.training.pipeline_parallel = 2
    with pytest.raises(UsageError, match="are not supported with pipeline_parallel"):
        check_complete(resolve_settings(config, ParallelPlan(pipeline_parallel=2)), {}, {"training"})
