"""One of two ranks runs out of memory: both go on with the same smaller micro-batch, and the result is that
of a run that began so.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import train_on_ranks
from safetensors.torch import load_file

from llm_trainer.run_dir import list_checkpoints

pytestmark = pytest.mark.slow

SETTINGS = {
    "max_steps": 6,
    "batch_size": 16,
    "micro_batch_size": 8,
    "gradient_accumulation_steps": None,
    "eval_interval": 100,
}
SETTINGS |= {"save_interval": 3, "save_total_limit": None, "warmup_steps": 1}

Run = dict[str, Any]


def a_run(name: str, short: Run | None = None, **settings: object) -> Run:
    return {"name": name, "settings": SETTINGS | settings} | ({} if short is None else {"short": short})


def launch(folder: Path, runs: list[Run]) -> subprocess.CompletedProcess[str]:
    """Trains the runs on two ranks."""
    return train_on_ranks(2, "short_ranks", folder, runs)


def outcomes(folder: Path, name: str) -> list[Run]:
    return [
        json.loads((folder / f"{name}-outcome-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)
    ]


def weights(run: Path) -> dict[str, torch.Tensor]:
    files = sorted((run / "final_model").glob("model*.safetensors"))  # one a rank where each wrote its own
    return {name: value for file in files for name, value in load_file(file).items()}


def difference(one: Path, other: Path) -> float:
    left, right = weights(one), weights(other)
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs that end by themselves, on two ranks that were started once."""
    base = tmp_path_factory.mktemp("short")
    runs = [
        a_run("small", micro_batch_size=4),
        a_run("at first forward", {"sequences": 4, "from_step": 0, "place": "forward"}),
        a_run("at first backward", {"sequences": 4, "from_step": 0, "place": "backward"}),
        a_run("later", {"sequences": 4, "from_step": 4, "place": "forward"}),
        a_run("again", micro_batch_size=4, resume_from=str(base / "later" / "emergency-4")),
        a_run("auto", micro_batch_size="auto") | {"allowance": 10**12},
        a_run("nothing fits", micro_batch_size="auto") | {"allowance": -(10**9)},
    ]
    done = launch(base, runs)
    assert done.returncode == 0, done.stderr[-3000:]
    return base


@pytest.mark.parametrize("name", ["at first forward", "at first backward"])
def test_the_first_step_tried_again_leads_to_the_very_weights_of_smaller_micro_batches(
    folder: Path, name: str
) -> None:
    assert outcomes(folder, name) == [{"ended_by": "finished", "micro_batch_size": 4, "step": 6}] * 2
    assert difference(folder / name, folder / "small") == 0.0


def test_a_later_step_is_tried_again_as_a_run_resumed_from_the_emergency_checkpoint_does_it(
    folder: Path,
) -> None:
    assert outcomes(folder, "later") == [{"ended_by": "finished", "micro_batch_size": 4, "step": 6}] * 2
    assert [
        one.step for one in list_checkpoints(folder / "later") if one.path.name.startswith("emergency")
    ] == [4]
    assert difference(folder / "later", folder / "again") == 0.0


def test_ranks_agree_on_what_fits(folder: Path) -> None:
    assert [one["micro_batch_size"] for one in outcomes(folder, "auto")] == [8, 8]
    first, second = outcomes(folder, "nothing fits")
    assert "not even micro_batch_size 1 fits" in first["error"]
    assert "not even micro_batch_size 1 fits" in second["error"]


@pytest.mark.parametrize(("plan", "place"), [({}, "backward"), ({"fsdp": 2}, "forward")])
def test_where_ranks_cannot_agree_the_run_ends_and_goes_on_smaller(
    tmp_path: Path, plan: Run, place: str
) -> None:
    done = launch(tmp_path, [a_run("run", {"sequences": 4, "from_step": 4, "place": place}, **plan)])
    assert done.returncode != 0
    assert "continue with --resume auto, which will use micro_batch_size 4" in done.stderr + done.stdout
    again = launch(
        tmp_path, [a_run("run", {"sequences": 4, "from_step": 0, "place": place}, resume_from="auto", **plan)]
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert [one["micro_batch_size"] for one in outcomes(tmp_path, "run")] == [4, 4]
    launch(
        tmp_path / "small",
        [a_run("run", micro_batch_size=4, resume_from=str(tmp_path / "run" / "checkpoint-3"), **plan)],
    )
    assert difference(tmp_path / "run", tmp_path / "small" / "run") == 0.0
