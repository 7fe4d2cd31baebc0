"""Batch arithmetic, presets' sizes, and what comes from the environment."""

from __future__ import annotations

from pathlib import Path

import pytest
from paths import ROOT

from llm_trainer.config import TrainingConfig, UsageError
from llm_trainer.config.environment import ENVIRONMENT_NAMES, apply_dotenv, launch_environment, read_dotenv
from llm_trainer.config.presets import PRESETS, preset
from llm_trainer.config.resolve.batch_size import BatchPlan, resolve_batches


@pytest.mark.parametrize(
    ("said", "ranks", "plan"),
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
def test_every_manuals_words_about_batches_come_to_one_pair(
    said: dict[str, int], ranks: int, plan: BatchPlan
) -> None:
    assert resolve_batches(TrainingConfig(**said), ranks) == plan


def test_sequences_of_a_step_count_all_ranks() -> None:
    training = TrainingConfig(batch_size=8, gradient_accumulation_steps=2, world_size=4)
    assert resolve_batches(training, 4).sequences_per_step(4) == 64


@pytest.mark.parametrize(
    ("said", "ranks", "message"),
    [
        ({"batch_size": 100, "micro_batch_size": 32}, 4, r"100 .* 32 × 4 ranks = 128; take batch_size 128"),
        ({"batch_size": 300, "micro_batch_size": 32}, 4, "take batch_size 256 or 384"),
        (
            {"batch_size": 12, "gradient_accumulation_steps": 40, "global_grad_accumulation": True},
            3,
            "40 counts all ranks together",
        ),
        (
            {"batch_size": 8, "micro_batch_size": 2, "gradient_accumulation_steps": 2},
            1,
            "= 4, but gradient_accumulation_steps says 2",
        ),
    ],
)
def test_what_does_not_divide_names_the_numbers(said: dict[str, int], ranks: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_batches(TrainingConfig(**said), ranks)


TRUE_MILLIONS = {
    "enhanced-nano": 124.4, "enhanced-small": 354.8, "enhanced-medium": 758.7, "enhanced-large": 1313.6, "enhanced-xl": 2648.9,
    "framework-tiny": 21.5, "framework-small": 134.1, "framework-medium": 348.7, "framework-large": 721.2, "framework-xl": 1574.0,
}  # fmt: skip


@pytest.mark.parametrize(("name", "millions"), TRUE_MILLIONS.items())
def test_presets_have_their_true_parameter_counts(name: str, millions: float) -> None:
    assert round(preset(name).parameters() / 1e6, 1) == millions


def test_the_manuals_sizes_are_all_there() -> None:
    others = {"trainer-small", "trainer-medium", "trainer-large", "l1-tiny", "l1-base"}
    assert set(PRESETS) == set(TRUE_MILLIONS) | others
    assert all(made.manual_figure for name, made in PRESETS.items() if name not in others)


def test_a_launcher_says_which_process_this_is() -> None:
    assert launch_environment({}).world_size == 1
    launched = launch_environment({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})
    assert (launched.rank, launched.local_rank, launched.world_size, launched.launched) == (3, 1, 4, True)
    with pytest.raises(UsageError, match="RANK='x'"):
        launch_environment({"RANK": "x", "WORLD_SIZE": "4"})
    with pytest.raises(UsageError, match="does not fit"):
        launch_environment({"RANK": "4", "WORLD_SIZE": "4"})


def test_the_example_environment_names_what_is_read_and_sets_nothing() -> None:
    text = (ROOT / ".env.example").read_text(encoding="utf-8")
    assert all(f"\n{name}=" in text for name in ENVIRONMENT_NAMES)
    assert read_dotenv(ROOT / ".env.example") == {}


def test_dotenv_fills_in_what_the_shell_does_not_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text(
        "HF_TOKEN='a b' # mine\nWANDB_MODE=offline\nPATH=/nowhere\n", encoding="utf-8"
    )
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.chdir(tmp_path)
    apply_dotenv()
    import os

    assert os.environ["HF_TOKEN"] == "a b"
    assert os.environ["WANDB_MODE"] == "disabled"
    assert os.environ["PATH"] != "/nowhere"
    (tmp_path / ".env").write_text("WANDB_MODE=of\n", encoding="utf-8")
    with pytest.raises(UsageError, match="WANDB_MODE='of'"):
        apply_dotenv(tmp_path)


def test_a_micro_batch_that_is_to_be_found_leaves_the_step_as_it_is_said() -> None:
    assert resolve_batches(TrainingConfig(micro_batch_size="auto", batch_size=64), 4) == BatchPlan(16, 1)
    assert resolve_batches(
        TrainingConfig(micro_batch_size="auto", gradient_accumulation_steps=2), 4
    ) == BatchPlan(16, 1)
    with pytest.raises(
        UsageError,
        match="auto settles the accumulation from batch_size 64, but gradient_accumulation_steps says 2",
    ):
        resolve_batches(
            TrainingConfig(micro_batch_size="auto", batch_size=64, gradient_accumulation_steps=2), 1
        )
    with pytest.raises(UsageError, match="batch_size 10 does not divide by 4 ranks; take 8"):
        resolve_batches(TrainingConfig(micro_batch_size="auto", batch_size=10), 4)
    with pytest.raises(UsageError, match="micro_batch_size=0: must be greater than 0"):
        TrainingConfig(micro_batch_size=0)
