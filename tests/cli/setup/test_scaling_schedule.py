"""What is printed of a scaling schedule before training."""

from __future__ import annotations

import pytest

from llm_trainer.cli.setup.scaling_schedule import first_after_the_end
from llm_trainer.config.schema.scaling_schedule import Operation


@pytest.mark.parametrize(
    ("waits", "steps", "first"),
    [([10, 10], 100, None), ([10, 90], 100, 2), ([100, 5], 100, 1), ([None, 99], 100, None), ([], 100, None)],
)
def test_entries_that_wait_beyond_the_end_are_found(
    waits: list[int | None], steps: int, first: int | None
) -> None:
    """An entry with a trigger (None here) may fire at once, so those after it wait from there."""
    schedule = [
        Operation(
            name="change_lr", value=0.5, trigger_loss=3.0 if wait is None else None, max_wait_iters=wait
        )
        for wait in waits
    ]
    assert first_after_the_end(schedule, steps) == first
