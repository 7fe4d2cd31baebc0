"""Which checkpoint several ranks go on from, or back to: verified by all of them together, the same one on
all, under every plan.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_faulty_ranks import RULE, a_run, losses, outcomes, train

from llm_trainer.run_dir import read_json, verify

pytestmark = pytest.mark.slow

Run = dict[str, Any]
PLANS: dict[str, Run] = {
    "replicas": {},
    "tensor": {"tensor_parallel": 2},
    "pipeline": {"pipeline_parallel": 2},
    "remote": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it on two ranks that are started once."""
    base = tmp_path_factory.mktemp("rollbacks")
    spike = {"factor": {"ranks": [0, 1], "by": 20, "steps": [8, 9]}}
    runs: list[Run] = []
    for name, plan in PLANS.items():
        remote = {"remote_dir": f"file://{base}/elsewhere"} if name == "remote" else {}
        runs.append(a_run(name, **plan, **remote, **RULE) | spike)
    source = base / "replicas"
    runs.append(a_run("resumed", resume_from=str(source / "checkpoint-9")))
    runs.append(
        a_run("damaged", resume_from=str(source / "checkpoint-6"))
        | {"garble": str(source / "checkpoint-6/config.json")}
    )
    train(base, runs)
    return base


@pytest.mark.parametrize("plan", PLANS)
def test_a_spike_takes_all_ranks_back_under_every_plan_alike(folder: Path, plan: str) -> None:
    assert [outcome["ended_by"] for outcome in outcomes(folder, plan)] == ["finished", "finished"]
    [line] = [line for line in outcomes(folder, plan)[0]["said"] if "loss spike" in line]
    assert "rolled back to step 6 (" in line
    pairs = zip(losses(folder / "replicas"), losses(folder / plan), strict=True)
    assert max(abs(one - other) / one for one, other in pairs) <= 1e-5


def test_after_a_rollback_the_copy_elsewhere_holds_the_way_that_was_kept(folder: Path) -> None:
    there, here = folder / "elsewhere/final_model", folder / "remote/final_model"
    assert verify(there) == []
    assert read_json(there / "manifest.json") == read_json(here / "manifest.json")
    assert verify(folder / "elsewhere/checkpoint-9") == []
    assert read_json(folder / "elsewhere/checkpoint-9/manifest.json") == read_json(
        folder / "remote/checkpoint-9/manifest.json"
    )


def test_a_resume_reads_each_file_once_on_all_ranks_together(folder: Path) -> None:
    checkpoint = folder / "replicas/checkpoint-9"
    files = read_json(checkpoint / "manifest.json")["files"]
    assert isinstance(files, dict)
    first, second = (outcome["read"] for outcome in outcomes(folder, "resumed"))
    assert first
    assert second
    assert sorted(first + second) == sorted((checkpoint / name).as_posix() for name in files)


def test_going_back_reads_each_file_once_on_all_ranks_together(folder: Path) -> None:
    for plan in PLANS:
        read = [path for outcome in outcomes(folder, plan) for path in outcome["read"]]
        assert read
        assert len(set(read)) == len(read)


def test_what_one_rank_finds_damaged_is_damaged_for_all(folder: Path) -> None:
    first, second = outcomes(folder, "damaged")
    assert first["error"] == second["error"] == "CheckpointError"
    assert "config.json has changed since it was saved" in first["message"]
    assert first["message"] == second["message"]
    assert "is complete" in first["message"]
