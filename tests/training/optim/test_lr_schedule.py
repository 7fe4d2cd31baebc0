"""Learning-rate schedules and run lengths: exact values, durations in every unit, and refused settings."""

from __future__ import annotations

import math

import pytest

from llm_trainer.config import Duration, TrainingConfig, UsageError
from llm_trainer.training.optim.lr_schedule import (
    LRSchedule,
    LRScheduleState,
    RunLength,
    resolve_lr_schedule,
    resolve_run_length,
)

STEPS = RunLength(1000, "max_steps 1000", steps_per_epoch=250.0, tokens_per_step=512)


@pytest.mark.parametrize(
    ("kind", "step", "expected"),
    [
        ("cosine", 0, 1 / 101),
        ("cosine", 99, 100 / 101),
        ("cosine", 100, 1.0),
        ("cosine", 550, 0.55),
        ("cosine", 1000, 0.1),
        ("cosine", 5000, 0.1),
        ("linear", 100, 1.0),
        ("linear", 550, 0.55),
        ("linear", 775, 0.325),
        ("linear", 1000, 0.1),
        ("constant", 50, 51 / 101),
        ("constant", 999, 1.0),
        ("constant", 5000, 1.0),
        ("wsd", 100, 1.0),
        ("wsd", 800, 1.0),
        ("wsd", 900, 0.55),
        ("wsd", 1000, 0.1),
    ],
)
def test_each_schedule_has_the_expected_values(kind: str, step: int, expected: float) -> None:
    schedule = LRSchedule(
        kind, warmup_steps=100, decay_steps=1000, minimum_fraction=0.1, wsd_decay_fraction=0.2
    )  # type: ignore[arg-type]
    assert schedule.factor(step) == pytest.approx(expected, abs=1e-12)


def test_operations_multiply_the_learning_rate_and_restart_the_schedule() -> None:
    schedule = LRSchedule("cosine", warmup_steps=10, decay_steps=100, minimum_fraction=0.0)
    assert schedule.factor(10, LRScheduleState(factor=0.5)) == 0.5
    again = LRScheduleState(offset=40)
    assert schedule.factor(40, again) == pytest.approx(1 / 11)
    assert schedule.factor(50, again) == 1.0
    assert schedule.factor(100, again) == pytest.approx(0.0)  # the end stays where it was


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_steps": 70}, 70),
        ({"num_epochs": 2}, 25),  # 100 samples in steps of 8
        ({"max_tokens": 1000}, 8),  # 128 tokens a step
        ({"max_steps": 70, "num_epochs": 2}, 25),
        ({"max_steps": 70, "num_epochs": 20, "max_tokens": 1000}, 8),
        ({}, 13),  # one epoch
        ({"max_steps": 0}, 0),
    ],
)
def test_a_run_ends_at_the_first_of_its_limits(settings: dict[str, int], steps: int) -> None:
    assert (
        resolve_run_length(
            TrainingConfig(**settings), samples_per_epoch=100, sequences_per_step=8, context=16
        ).steps
        == steps
    )


def test_durations_are_accepted_in_every_unit() -> None:
    assert [STEPS.in_steps(Duration.parse(text)) for text in (30, "0.5 epochs", "5k tokens", "1 token")] == [
        30,
        125,
        10,
        1,
    ]


def test_a_default_warmup_is_a_tenth_of_a_short_run() -> None:
    assert resolve_lr_schedule(TrainingConfig(), STEPS).warmup_steps == 100
    long = RunLength(100_000, "max_steps", 250.0, 512)
    assert resolve_lr_schedule(TrainingConfig(), long).warmup_steps == 2000


def test_a_warmup_that_the_user_has_set_and_is_longer_than_the_run_is_refused() -> None:
    with pytest.raises(UsageError, match="warmup_steps 2000 is longer than the run of 1000 steps"):
        resolve_lr_schedule(TrainingConfig(warmup_steps=2000), STEPS)
    with pytest.raises(UsageError, match="longer than lr_decay_steps"):
        resolve_lr_schedule(TrainingConfig(warmup_steps=200, lr_decay_steps=100), STEPS)


def test_the_minimum_learning_rate_is_a_tenth_unless_it_is_set() -> None:
    assert resolve_lr_schedule(TrainingConfig(), STEPS).minimum_fraction == 0.1
    schedule = resolve_lr_schedule(
        TrainingConfig(learning_rate=1e-3, min_lr=1e-4 / 4, lr_decay_iters=500), STEPS
    )
    assert math.isclose(schedule.factor(500), 0.025)
    with pytest.raises(UsageError, match="above learning_rate"):
        resolve_lr_schedule(TrainingConfig(learning_rate=1e-3, min_lr=1e-2), STEPS)
