"""A run through DeepSpeed is the run without it: the same losses, the same checkpoints, and each goes on from
the other's.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_ranks import POISON, STEPS, TOLERANCE, a_run, differences, on_ranks, series

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="the extra 'deepspeed' is not installed"
    ),
]

STAGES = (1, 2, 3)
GOES_ON = (2, 3)  # stage 1 keeps its state as stage 2 does
FILE = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": "auto",
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
    },
}
RULE = {
    "max_rollbacks": 1,
    "spike_window": 6,
    "spike_sigma": 12.0,
    "spike_patience": 1,
    "spike_rollback_steps": 1,
    "save_interval": 3,
}
SPIKE = {"poisoned_step": 8, "poison": 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything, in two starts of two ranks and one of one."""
    base = tmp_path_factory.mktemp("deepspeed")
    (base / "whole.json").write_text(json.dumps(FILE), encoding="utf-8")
    zero = {"use_deepspeed": True}
    runs = [
        a_run("ddp"),
        a_run("ddp-poisoned") | POISON,
        a_run("ddp-bf16", precision="bf16"),
        a_run("ddp-spike", **RULE) | SPIKE,
    ]
    runs += [a_run(f"zero-{stage}", zero_stage=stage, **zero) for stage in STAGES]
    runs += [a_run(f"zero-{stage}-poisoned", zero_stage=stage, **zero) | POISON for stage in (1, 3)]
    runs += [a_run("zero-file", deepspeed_config=str(base / "whole.json"), **zero)]
    runs += [
        a_run("zero-bf16", precision="bf16", **zero),
        a_run("zero-spike", zero_stage=3, **RULE, **zero) | SPIKE,
    ]
    runs += [
        a_run(f"plain-from-{stage}", resume_from=str(base / f"zero-{stage}/checkpoint-12"))
        for stage in GOES_ON
    ]
    runs += [
        a_run(f"zero-{stage}-on", zero_stage=stage, resume_from=str(base / "ddp/checkpoint-12"), **zero)
        for stage in GOES_ON
    ]
    on_ranks(2, base, runs)
    on_ranks(1, base, [a_run("one", resume_from=str(base / "zero-2/checkpoint-12"), **zero)])
    return base


@pytest.mark.parametrize("name", ["zero-1", "zero-2", "zero-3", "zero-file"])
def test_zero_has_the_loss_of_plain_replicas(folder: Path, name: str) -> None:
    off = differences(series(folder / "ddp"), series(folder / name))
    assert len(off) == STEPS
    assert max(off) <= TOLERANCE
    assert (
        max(differences(series(folder / "ddp", "val_loss"), series(folder / name, "val_loss"))) <= TOLERANCE
    )
    assert (
        max(differences(series(folder / "ddp", "gradient_norm"), series(folder / name, "gradient_norm")))
        <= 10 * TOLERANCE
    )


@pytest.mark.parametrize("stage", STAGES)
def test_its_checkpoint_holds_what_a_plain_one_holds(folder: Path, stage: int) -> None:
    plain, other = folder / "ddp/checkpoint-12", folder / f"zero-{stage}/checkpoint-12"
    files = sorted(str(path.relative_to(plain)) for path in plain.rglob("*"))
    assert files == sorted(str(path.relative_to(other)) for path in other.rglob("*"))
    for name in [name for name in files if name.endswith(".safetensors")]:
        ours, theirs = load_file(plain / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert value.shape == theirs[key].shape
            assert (value - theirs[key]).abs().max() <= 1e-5, key


@pytest.mark.parametrize(
    "name", [*(f"plain-from-{stage}" for stage in GOES_ON), *(f"zero-{stage}-on" for stage in GOES_ON), "one"]
)
def test_a_run_goes_on_with_and_without_it(folder: Path, name: str) -> None:
    assert max(differences(series(folder / "ddp")[12:], series(folder / name))) <= TOLERANCE


@pytest.mark.parametrize("stage", [1, 3])
def test_zero_leaves_out_a_step_that_is_not_finite(folder: Path, stage: int) -> None:
    assert (
        max(differences(series(folder / "ddp-poisoned"), series(folder / f"zero-{stage}-poisoned")))
        <= TOLERANCE
    )


def test_zero_in_bf16_stays_near_plain_replicas(folder: Path) -> None:
    off = differences(series(folder / "ddp-bf16"), series(folder / "zero-bf16"))
    assert max(off) <= 1e-3
    assert max(differences(series(folder / "ddp"), series(folder / "zero-bf16"))) > 1e-5  # it is bf16


def test_zero_goes_back_from_a_spike_as_plain_replicas_do(folder: Path) -> None:
    plain, zero = series(folder / "ddp-spike"), series(folder / "zero-spike")
    assert max(differences(plain, zero)) <= TOLERANCE
    assert max(differences(series(folder / "ddp"), plain)) > 1e-4  # it did go back


def test_one_process_needs_no_launcher(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a small text to train on, again and again.\n" * 200, encoding="utf-8")
    shape = ["--hidden_size=16", "--num_layers=1", "--num_heads=2", "--max_seq_len=16", "--vocab_size=300"]
    length = ["--batch_size=2", "--max_steps=2", "--eval_iters=1", "--precision=fp32", "--compile=off"]
    command = ["train", "--input=text.txt", "--output_dir=run", "--device=cpu", "--use_deepspeed=true"]
    launcher = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    done = subprocess.run(
        [sys.executable, "-m", "llm_trainer", *command, *shape, *length],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name not in launcher},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/final_model/model.safetensors").is_file()
