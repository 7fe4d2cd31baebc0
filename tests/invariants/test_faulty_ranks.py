"""What goes wrong on one rank is dealt with by all alike: numbers that are none, spikes, signals, deaths, a
full disk.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from launch import environment, torchrun_command, train_on_ranks, write_runs

from llm_trainer.diagnostics.verify_resume import compare_checkpoints
from llm_trainer.run_dir import list_checkpoints, verify
from llm_trainer.training.logging.metrics import read_metrics
from llm_trainer.training.preemption import EXIT_PREEMPTED

pytestmark = pytest.mark.slow

SETTINGS = {
    "max_steps": 12,
    "batch_size": 8,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": None,
    "eval_interval": 4,
}
SETTINGS |= {"save_interval": 3, "save_total_limit": None, "warmup_steps": 1}
RULE = {
    "max_rollbacks": 1,
    "spike_window": 6,
    "spike_sigma": 12.0,
    "spike_patience": 2,
    "spike_rollback_steps": 1,
    "spike_lr_factor": 0.5,
}
KINDS = {"ddp": 1, "fsdp": 2}
WRITERS = [("ddp", 0), ("fsdp", 0), ("fsdp", 1)]  # who writes files of a save
SAVES = ["off", "on"]  # in the background or not
PLACES = {"step": 5, "save": 6, "validation": 8}

Run = dict[str, Any]


def a_run(name: str, **settings: object) -> Run:
    return {"name": name, "settings": SETTINGS | settings}


def train(folder: Path, runs: list[Run]) -> None:
    """Trains the runs on two ranks; each rank leaves an outcome."""
    done = train_on_ranks(2, "faulty_ranks", folder, runs)
    assert done.returncode == 0, done.stdout + done.stderr


def start(folder: Path, runs: list[Run], *flags: str, before: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Starts the runs on two ranks in fresh processes."""
    write_runs(folder, runs)
    command = [*before, *torchrun_command(2, "faulty_ranks", folder, *flags)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment(), stdout=pipe, stderr=subprocess.STDOUT, text=True)


def outcomes(folder: Path, name: str) -> list[Run]:
    return [
        json.loads((folder / f"{name}-outcome-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)
    ]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run) if "loss" in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs that end by themselves, on two ranks that were started once; and the same spike on one."""
    base = tmp_path_factory.mktemp("faulty")
    on_one = {"ranks": [1]}
    on_both = {"ranks": [0, 1]}
    runs: list[Run] = []
    for kind, fsdp in KINDS.items():
        runs += [
            a_run(f"{kind}-whole", fsdp=fsdp),
            a_run(f"{kind}-nan", fsdp=fsdp, max_skipped_steps=3)
            | {"factor": on_one | {"by": "nan", "steps": list(range(5, 13))}},
            a_run(f"{kind}-spike", fsdp=fsdp, **RULE) | {"factor": on_both | {"by": 20, "steps": [8, 9]}},
        ]
    for place, step in PLACES.items():
        runs += [
            a_run(f"signal-in-{place}") | {"signal": {"place": place, "rank": 1, "step": step}},
            a_run(f"signal-in-{place}", resume_from="auto") | {"outcome": f"resumed-in-{place}"},
        ]
    for (kind, rank), how in itertools.product(WRITERS, SAVES):
        run = a_run(
            f"refused-{kind}-{rank}-{how}", fsdp=KINDS[kind], asynchronous_saves=how, eval_interval=100
        )
        runs.append(run | {"full_disk": {"place": "file of a save", "rank": rank, "step": 6}})
    train(base, runs)
    return base


@pytest.mark.parametrize("kind", KINDS)
def test_where_one_rank_has_no_numbers_all_stop_after_as_many_steps_and_name_the_samples(
    folder: Path, kind: str
) -> None:
    for outcome in outcomes(folder, f"{kind}-nan"):
        assert outcome["error"] == "TrainingDivergedError"
        assert outcome["message"].startswith(
            "3 steps in a row without a finite loss and gradient, the last on samples 48 to 55"
        )
    said = outcomes(folder, f"{kind}-nan")[0]["said"]
    named = [re.search(r"samples \d+ to \d+", line) for line in said if "skipped" in line]
    assert [match[0] for match in named if match] == [
        "samples 32 to 39",
        "samples 40 to 47",
        "samples 48 to 55",
    ]
    assert losses(folder / f"{kind}-nan")[:4] == losses(folder / f"{kind}-whole")[:4]


@pytest.mark.parametrize("kind", KINDS)
def test_a_spike_takes_all_ranks_back_to_one_checkpoint(folder: Path, kind: str) -> None:
    for outcome in outcomes(folder, f"{kind}-spike"):
        assert (outcome["ended_by"], outcome["step"]) == ("finished", 12)
    [line] = [line for line in outcomes(folder, f"{kind}-spike")[0]["said"] if "loss spike" in line]
    assert "rolled back to step 6 (" in line
    assert losses(folder / f"{kind}-spike")[:6] == losses(folder / f"{kind}-whole")[:6]
    assert max(losses(folder / f"{kind}-spike")) < 10
    [back] = [line for line in read_metrics(folder / f"{kind}-spike") if "rollback" in line]
    assert (back["step"], back["rollback_from_step"]) == (6, 9)


def test_a_spike_ends_alike_by_replicas_and_by_shards(folder: Path) -> None:
    pairs = zip(losses(folder / "ddp-spike"), losses(folder / "fsdp-spike"), strict=True)
    assert max(abs(one - other) / one for one, other in pairs) <= 1e-6


@pytest.mark.parametrize("place", PLACES)
def test_a_signal_to_one_rank_saves_on_all_and_the_resumed_run_is_the_uninterrupted_one(
    folder: Path, place: str
) -> None:
    run = folder / f"signal-in-{place}"
    assert [one.step for one in list_checkpoints(run) if one.path.name.startswith("emergency-")] == [
        PLACES[place]
    ]
    for outcome in outcomes(folder, f"signal-in-{place}"):
        assert (outcome["ended_by"], outcome["status"]) == ("preempted", EXIT_PREEMPTED)
    assert compare_checkpoints(run / "final_model", folder / "ddp-whole/final_model") == []


def check_full_disk(folder: Path, name: str) -> None:
    for outcome in outcomes(folder, name):
        assert outcome["error"] == "CheckpointError"
        assert "checkpoint-6 could not be saved" in outcome["message"]
        assert "Earlier checkpoints are untouched" in outcome["message"]
    assert [one.path.name for one in list_checkpoints(folder / name) if not verify(one.path)][
        -1
    ] == "checkpoint-3"
    assert not list((folder / name).glob(".tmp-*"))


@pytest.mark.parametrize("how", SAVES)
@pytest.mark.parametrize(("kind", "rank"), WRITERS)
def test_a_save_that_one_rank_cannot_write_ends_all_with_the_earlier_one_whole(
    folder: Path, kind: str, rank: int, how: str
) -> None:
    check_full_disk(folder, f"refused-{kind}-{rank}-{how}")


def test_a_disk_that_fills_up_ends_all_ranks_with_what_is_missing(tmp_path: Path) -> None:
    """A real one: a small tmpfs in a user namespace, filled between two saves."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=24m none {disk} && mv {tmp_path}/runs.json {disk}"
    inside = f'{mount} && "$@"; status=$?; cp -a {disk} {kept}; exit $status'
    run = a_run("run", eval_interval=100) | {"full_disk": {"place": "step", "rank": 1, "step": 4}}
    (tmp_path / "runs.json").write_text(json.dumps([run]), encoding="utf-8")
    process = start(disk, [run], before=("unshare", "-rm", "sh", "-c", inside, "sh"))
    said, _ = process.communicate(timeout=200)
    if "unshare" in said or "mount" in said:
        pytest.skip(f"no user namespaces here: {said.strip()}")
    check_full_disk(kept, "run")
    assert "MB are missing" in outcomes(kept, "run")[1]["message"]


DEATHS = {
    "ddp": [
        {"place": "before backward", "rank": 1, "step": 2},
        {"place": "all-reduce", "rank": 1, "step": 5},
        {"place": "file of a save", "rank": 0, "step": 6},
        {"place": "save", "rank": 1, "step": 9},
    ],
    "fsdp": [
        {"place": "before backward", "rank": 0, "step": 5},
        {"place": "file of a save", "rank": 1, "step": 6},
    ],
}


@pytest.mark.parametrize(("kind", "how"), [("ddp", "off"), ("fsdp", "off"), ("fsdp", "on")])
def test_a_rank_that_dies_anywhere_ends_all_in_ten_seconds_by_name_and_restarted_the_run_is_whole(
    folder: Path, tmp_path: Path, kind: str, how: str
) -> None:
    """Killed before a backward pass, in the middle of an all-reduce, while it writes its part of a save (in
    the background, too) and while it waits for others who do; after each torchrun starts all ranks again.
    """
    deaths = DEATHS[kind]
    run = a_run("whole", fsdp=KINDS[kind], resume_from="auto", asynchronous_saves=how) | {"deaths": deaths}
    process = start(tmp_path, [run], f"--max-restarts={len(deaths)}", "--monitor-interval=0.1")
    assert process.stdout is not None
    seen: list[tuple[float, str]] = [(time.monotonic(), line) for line in process.stdout]
    process.wait(timeout=60)
    said = "".join(line for _, line in seen)
    assert process.returncode == 0, said
    ends = [(when, line) for when, line in seen if "dies now" in line or "failed (exitcode: -9)" in line]
    died, told = ends[::2], ends[1::2]  # torchrun tells when it has ended the others
    assert [line.split()[1] for _, line in died] == [str(death["rank"]) for death in deaths], said
    for death, (when, _), (end, line) in zip(deaths, died, told, strict=True):
        assert f"local_rank: {death['rank']} " in line
        assert end - when <= 10
    assert compare_checkpoints(tmp_path / "whole/final_model", folder / f"{kind}-whole/final_model") == []
    assert losses(tmp_path / "whole") == losses(folder / f"{kind}-whole")
