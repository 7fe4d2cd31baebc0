"""Sizes of the presets, and what is read from the environment."""

from __future__ import annotations

from pathlib import Path

import pytest
from paths import ROOT

from llm_trainer.config import UsageError
from llm_trainer.config.environment import ENVIRONMENT_NAMES, apply_dotenv, launch_environment, read_dotenv
from llm_trainer.config.presets import PRESETS, get_preset

TRUE_MILLIONS = {
    "enhanced-nano": 124.4, "enhanced-small": 354.8, "enhanced-medium": 758.7, "enhanced-large": 1313.6,
    "enhanced-xl": 2648.9, "framework-tiny": 21.5, "framework-small": 134.1, "framework-medium": 348.7,
    "framework-large": 721.2, "framework-xl": 1574.0,
}  # fmt: skip


@pytest.mark.parametrize(("name", "millions"), TRUE_MILLIONS.items())
def test_presets_have_their_true_parameter_counts(name: str, millions: float) -> None:
    assert round(get_preset(name).parameters() / 1e6, 1) == millions


def test_all_sizes_of_the_manuals_are_presets() -> None:
    others = {"trainer-small", "trainer-medium", "trainer-large", "l1-tiny", "l1-base"}
    assert set(PRESETS) == set(TRUE_MILLIONS) | others
    assert all(made.nominal_size for name, made in PRESETS.items() if name not in others)


def test_launch_environment_reads_the_launchers_variables() -> None:
    assert launch_environment({}).world_size == 1
    launched = launch_environment({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})
    assert (launched.rank, launched.local_rank, launched.world_size, launched.launched) == (3, 1, 4, True)
    with pytest.raises(UsageError, match="RANK: 'x'"):
        launch_environment({"RANK": "x", "WORLD_SIZE": "4"})
    with pytest.raises(UsageError, match="is not below"):
        launch_environment({"RANK": "4", "WORLD_SIZE": "4"})


def test_the_example_environment_lists_every_variable_and_sets_none() -> None:
    text = (ROOT / ".env.example").read_text(encoding="utf-8")
    assert all(f"\n{name}=" in text for name in ENVIRONMENT_NAMES)
    assert read_dotenv(ROOT / ".env.example") == {}


def test_dotenv_sets_only_variables_that_the_shell_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    with pytest.raises(UsageError, match=r"invalid value for WANDB_MODE .*'of'"):
        apply_dotenv(tmp_path)
