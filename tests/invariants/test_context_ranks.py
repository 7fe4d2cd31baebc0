"""Sequences shared by ranks: the same samples, the same loss, the same checkpoints as on one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_ranks import LLAMA, LORA, STEPS, TOLERANCE, a_run, differences, on_ranks, series

from llm_trainer.run_dir import verify

pytestmark = pytest.mark.slow

CONTEXT = {"context_parallel": 2}
PACKED = {"document_every": 5}
WINDOW = LLAMA | {"sliding_window": 4}
TIED = {"tie_word_embeddings": True}
RECOMPUTED = {"gradient_checkpointing": True}
RUNS = {
    "context": a_run("context", **CONTEXT),
    "context-packed": a_run("context-packed", RECOMPUTED, **CONTEXT) | PACKED,
    "context-window": a_run("context-window", WINDOW, **CONTEXT) | PACKED,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on one rank and on two, all started once only."""
    base = tmp_path_factory.mktemp("context")
    on_ranks(
        1, base, [a_run("plain"), a_run("plain-packed") | PACKED, a_run("plain-window", WINDOW) | PACKED]
    )
    on_ranks(
        2,
        base,
        [*RUNS.values(), a_run("resumed-on-2", resume_from=str(base / "plain/checkpoint-12"), **CONTEXT)],
    )
    return base


def alone(name: str) -> str:
    """The same run on one rank."""
    return name.replace("context", "plain")


def assert_equal_runs(one: Path, other: Path) -> None:
    off = differences(series(one), series(other))
    assert len(off) == STEPS
    assert max(off) <= TOLERANCE
    drift = sum(off[STEPS // 2 :]) - sum(off[: STEPS // 2])
    assert drift / (STEPS // 2) <= TOLERANCE / 2
    assert max(differences(series(one, "val_loss"), series(other, "val_loss"))) <= TOLERANCE


@pytest.mark.parametrize("name", RUNS)
def test_ranks_that_share_sequences_have_the_losses_of_one(folder: Path, name: str) -> None:
    assert_equal_runs(folder / alone(name), folder / name)


def test_documents_change_the_loss_that_is_compared(folder: Path) -> None:
    """Or the test above would not see them ignored."""
    assert max(differences(series(folder / "plain"), series(folder / "plain-packed"))) > 1e-4


def test_a_whole_run_goes_on_with_its_sequences_shared(folder: Path) -> None:
    assert max(differences(series(folder / "plain")[12:], series(folder / "resumed-on-2"))) <= TOLERANCE


def test_ranks_that_share_sequences_hold_and_save_shards(folder: Path) -> None:
    saved = folder / "context/checkpoint-12"
    assert verify(saved) == []
    sizes = [path.stat().st_size for path in sorted((saved / "optimizer").iterdir())]
    assert len(sizes) == 2
    assert max(sizes) < 1.2 * min(sizes)


def test_adapters_tied_embeddings_and_one_pass_have_the_losses_of_one_rank(folder: Path) -> None:
    others = {"lora": LORA, "tied": TIED, "one-pass": {}}
    on_ranks(
        1,
        folder,
        [a_run("plain-lora", LORA), a_run("plain-tied", TIED), a_run("plain-one-pass", micro_batch_size=16)],
    )
    shared = [a_run(f"context-{name}", model, **CONTEXT) for name, model in others.items()]
    shared[-1]["settings"] = shared[-1]["settings"] | {"micro_batch_size": 16}  # type: ignore[operator]
    on_ranks(2, folder, shared)
    for name in others:
        assert_equal_runs(folder / f"plain-{name}", folder / f"context-{name}")


def test_four_ranks_that_share_sequences_have_the_losses_of_one(folder: Path) -> None:
    """Four ranks per sequence, and two with replicas, shards or tensor parallelism; one rank resumes."""
    mixed = {
        "four": {"context_parallel": 4},
        "context-replicas": CONTEXT,
        "context-fsdp": CONTEXT | {"fsdp": 2},
        "context-tensor": CONTEXT | {"tensor_parallel": 2},
    }
    on_ranks(4, folder, [a_run(name, WINDOW, **plan) | PACKED for name, plan in mixed.items()])
    resumed = [
        a_run(f"resumed-{name}", WINDOW, resume_from=str(folder / name / "checkpoint-12")) | PACKED
        for name in mixed
    ]
    on_ranks(1, folder, resumed)
    plain = folder / "plain-window"
    for name in mixed:
        assert_equal_runs(plain, folder / name)
        assert max(differences(series(plain)[12:], series(folder / f"resumed-{name}"))) <= TOLERANCE
