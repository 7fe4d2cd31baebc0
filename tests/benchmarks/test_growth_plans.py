"""What the growth benchmark counts: FLOPs by the shape of each step, and the first validation at or below the
bar.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
from paths import ROOT


@pytest.fixture
def growth(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import growth

    yield growth
    for name in ("growth", "lora", "memory", "common"):
        sys.modules.pop(name, None)


def test_steps_before_growth_cost_what_the_small_shape_costs(growth: ModuleType) -> None:
    plan, ids = growth.Plan(small=30, whole=20), 65
    small, whole = growth.Plan(1, 0).flops(1, ids), growth.Plan(0, 1).flops(1, ids)
    assert plan.flops(30, ids) == pytest.approx(30 * small)
    assert plan.flops(plan.steps, ids) == pytest.approx(30 * small + 20 * whole)
    assert 3 < whole / small < 4  # four times the blocks beside the same head


def test_the_bar_is_reached_at_the_first_validation_that_is_not_above_it(growth: ModuleType) -> None:
    run = growth.Trained(growth.Plan(10, 10), [(5, 1.0, 3.0), (10, 2.0, 2.5), (15, 3.5, 2.5), (20, 5.0, 2.4)])
    assert run.reached(2.5) == (10, 2.0)
    assert run.reached(2.39) is None
    assert run.end == 2.4
