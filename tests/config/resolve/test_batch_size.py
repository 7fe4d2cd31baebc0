"""Batch settings resolve to one micro-batch size and one number of accumulation steps."""

from __future__ import annotations

import pytest

from llm_trainer.config import TrainingConfig, UsageError
from llm_trainer.config.resolve.batch_size import BatchPlan, resolve_batches


@pytest.mark.parametrize(
    ("given", "ranks", "plan"),
    [
        ({"batch_size": 128, "micro_batch_size": 32}, 4, BatchPlan(32, 1)),
        ({"batch_size": 128, "micro_batch_size": 32}, 1, BatchPlan(32, 4)),
        ({"batch_size": 512, "micro_batch_size": 16}, 32, BatchPlan(16, 1)),
        ({"batch_size": 8, "gradient_accumulation_steps": 2}, 4, BatchPlan(8, 2)),
        ({"batch_size": 16, "gradient_accumulation_steps": 4}, 1, BatchPlan(16, 4)),
        (
            {"batch_size": 12, "gradient_accumulation_steps": 40, "global_grad_accumulation": True},
            8,
            BatchPlan(12, 5),
        ),
        ({"micro_batch_size": 3}, 2, BatchPlan(3, 1)),
        ({"batch_size": 8, "micro_batch_size": 2, "gradient_accumulation_steps": 4}, 1, BatchPlan(2, 4)),
    ],
)
def test_batch_settings_of_every_manual_resolve_to_one_plan(
    given: dict[str, int], ranks: int, plan: BatchPlan
) -> None:
    assert resolve_batches(TrainingConfig(**given), ranks) == plan


def test_sequences_of_a_step_count_all_ranks() -> None:
    training = TrainingConfig(batch_size=8, gradient_accumulation_steps=2, world_size=4)
    assert resolve_batches(training, 4).sequences_per_step(4) == 64


@pytest.mark.parametrize(
    ("given", "ranks", "message"),
    [
        ({"batch_size": 100, "micro_batch_size": 32}, 4, r"100 .* 32 × 4 ranks = 128; use batch_size 128"),
        ({"batch_size": 300, "micro_batch_size": 32}, 4, "use batch_size 256 or 384"),
        (
            {"batch_size": 12, "gradient_accumulation_steps": 40, "global_grad_accumulation": True},
            3,
            "40 counts all ranks together",
        ),
        (
            {"batch_size": 8, "micro_batch_size": 2, "gradient_accumulation_steps": 2},
            1,
            "= 4, but gradient_accumulation_steps is 2",
        ),
    ],
)
def test_batch_sizes_that_are_not_divisible_are_errors_with_the_numbers(
    given: dict[str, int], ranks: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_batches(TrainingConfig(**given), ranks)


def test_micro_batch_size_auto_keeps_the_size_of_the_step() -> None:
    assert resolve_batches(TrainingConfig(micro_batch_size="auto", batch_size=64), 4) == BatchPlan(16, 1)
    assert resolve_batches(
        TrainingConfig(micro_batch_size="auto", gradient_accumulation_steps=2), 4
    ) == BatchPlan(16, 1)
    with pytest.raises(
        UsageError,
        match="auto derives the accumulation from batch_size 64, but gradient_accumulation_steps is 2",
    ):
        resolve_batches(
            TrainingConfig(micro_batch_size="auto", batch_size=64, gradient_accumulation_steps=2), 1
        )
    with pytest.raises(UsageError, match="batch_size 10 is not divisible by 4 ranks; use 8"):
        resolve_batches(TrainingConfig(micro_batch_size="auto", batch_size=10), 4)
    with pytest.raises(UsageError, match=r"micro_batch_size: 0 \(must be greater than 0\)"):
        TrainingConfig(micro_batch_size=0)
