"""A schedule with every operation in it: the same losses on one rank, on two replicas, on two shards,
compiled, and after a resume.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launch import train_on_ranks

from llm_trainer.training.logging.metrics import read_metrics

pytestmark = pytest.mark.slow

STEPS = 21
COMMON: dict[str, object] = {
    "max_steps": STEPS,
    "batch_size": 16,
    "micro_batch_size": 4,
    "gradient_accumulation_steps": None,
}
COMMON |= {"eval_interval": 7, "learning_rate": 3e-3, "save_interval": 8, "save_total_limit": None}
TOLERANCE = {"adamw": 2e-6, "muon": 1e-2}  # Muon's iteration is in bf16

Run = dict[str, Any]


def entry(name: str, value: object = None, **more: object) -> Run:
    return {"name": name, "value": value, "max_wait_iters": 1, **more}


SCHEDULE = [
    entry("stack_layers", [0, 1, 0, 1]),
    entry("stack_layers", [0, 1, 2, 3, 3], mode="identity"),
    entry("widen_mlp", 80),
    entry("freeze_layer", ["attn.0-1", "wte"]),
    entry("widen_model", [32, 4]),
    entry("prune_heads", ["attn.1", 0.25]),
    entry("prune_mlp", ["mlp.*", 0.2]),
    entry("set_layer_lora_rank", ["attn.0", 2]),
    entry("set_layer_lora_rank", ["attn.0", 4]),
    entry("merge_lora_weights"),
    entry("unfreeze_layer", ["attn.0-1", "wte"]),
    entry("set_layer_lora_rank", ["attn.0", 0]),
    entry("resize_vocabulary", 40),
    entry("change_batch_size", 0.5, reevaluate=True),
    entry("change_grad_accum", 0.5),
    entry("change_lr", 0.5),
    entry("reset_lr_schedule"),
]


# What two ranks of a tensor group can cut at every point: heads and units in pairs, adapters outside the
# blocks alone.
EVEN_SCHEDULE = [
    {**one, "value": ["attn.1", 0.5]} if one["name"] == "prune_heads"
    else {**one, "value": ["wte", one["value"][1]]}
    if one["name"] == "set_layer_lora_rank" else one
    for one in SCHEDULE
]  # fmt: skip


# A set that is there from the start, one that does not count, and one that comes on the way.
SETS = {
    "lora": {"mine": {"ranks": {"attn.0": 2}}, "spare": {"ranks": {"mlp.0": 2}}},
    "active_adapters": ["mine"],
}
SETS_SCHEDULE = [entry("set_layer_lora_rank", ["attn.1", 2])]


def a_run(name: str, schedule: list[Run] = SCHEDULE, **settings: object) -> Run:
    return {"name": name, "model": {"dropout": 0.0}, "settings": COMMON | settings, "schedule": schedule}


def on_ranks(count: int, folder: Path, runs: list[Run]) -> None:
    """Trains the runs on so many ranks."""
    done = train_on_ranks(count, "operations_run", folder, runs)
    assert done.returncode == 0, done.stdout + done.stderr


def series(run: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in read_metrics(run) if name in line]


def largest_difference(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other) > 0
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on one rank and on two, started once each."""
    base = tmp_path_factory.mktemp("operations")
    plain = [a_run(f"plain-{optimizer}", optimizer=optimizer) for optimizer in TOLERANCE]
    plain += [a_run(f"plain-even-{optimizer}", EVEN_SCHEDULE, optimizer=optimizer) for optimizer in TOLERANCE]
    sets = {
        "schedule": SETS_SCHEDULE,
        "model": {"dropout": 0.0, **SETS},
        "settings": COMMON | {"max_steps": 5},
    }
    plain += [sets | {"name": "plain-sets"}]
    on_ranks(1, base, plain)
    two = [a_run(f"ddp-{optimizer}", optimizer=optimizer) for optimizer in TOLERANCE]
    two += [a_run(f"fsdp-{optimizer}", optimizer=optimizer, fsdp=2) for optimizer in TOLERANCE]
    two += [
        a_run(f"tensor-{optimizer}", EVEN_SCHEDULE, optimizer=optimizer, tensor_parallel=2)
        for optimizer in TOLERANCE
    ]
    start = str(base / "plain-adamw/checkpoint-8")
    two += [a_run("resumed-fsdp", fsdp=2, resume_from=start), sets | {"name": "ddp-sets"}]
    on_ranks(2, base, two)
    return base


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "tensor"])
@pytest.mark.parametrize("optimizer", TOLERANCE)
def test_every_operation_is_the_same_on_two_ranks(folder: Path, kind: str, optimizer: str) -> None:
    plain, run = folder / f"plain-{'even-' * (kind == 'tensor')}{optimizer}", folder / f"{kind}-{optimizer}"
    assert len(series(plain)) == STEPS
    assert largest_difference(series(plain), series(run)) <= TOLERANCE[optimizer]
    assert largest_difference(series(plain, "val_loss"), series(run, "val_loss")) <= TOLERANCE[optimizer]
    told = [
        [json.loads(line) for line in (one / "operations.jsonl").read_text(encoding="utf-8").splitlines()]
        for one in (plain, run)
    ]
    assert [line["operation"] for line in told[1]] == [one["name"] for one in SCHEDULE]
    assert [line["parameters_after"] for line in told[0]] == [line["parameters_after"] for line in told[1]]


def test_a_run_goes_on_in_the_middle_of_its_schedule_on_another_number_of_ranks(folder: Path) -> None:
    assert (
        largest_difference(series(folder / "plain-adamw")[8:], series(folder / "resumed-fsdp"))
        <= TOLERANCE["adamw"]
    )


def test_sets_of_adapters_of_which_some_count_are_trained_alike_on_two_ranks(folder: Path) -> None:
    assert len(series(folder / "ddp-sets")) == 5
    assert (
        largest_difference(series(folder / "plain-sets"), series(folder / "ddp-sets")) <= TOLERANCE["adamw"]
    )


def test_every_operation_is_the_same_where_ranks_share_sequences(folder: Path) -> None:
    on_ranks(2, folder, [a_run("context-adamw", context_parallel=2)])
    test_every_operation_is_the_same_on_two_ranks(folder, "context", "adamw")


@pytest.mark.parametrize("optimizer", TOLERANCE)
def test_every_operation_is_the_same_compiled(folder: Path, optimizer: str) -> None:
    on_ranks(1, folder, [a_run(f"compiled-{optimizer}", optimizer=optimizer, compile="on")])
    assert (
        largest_difference(series(folder / f"plain-{optimizer}"), series(folder / f"compiled-{optimizer}"))
        <= 5 * TOLERANCE[optimizer]
    )


def test_a_sharded_run_goes_on_on_one_rank(folder: Path) -> None:
    on_ranks(1, folder, [a_run("resumed-on-1", resume_from=str(folder / "fsdp-adamw/checkpoint-8"))])
    assert (
        largest_difference(series(folder / "fsdp-adamw")[8:], series(folder / "resumed-on-1"))
        <= TOLERANCE["adamw"]
    )
