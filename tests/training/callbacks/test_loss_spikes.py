"""A loss spike rolls the run back and skips the data that led there: within max_rollbacks, with a message,
and in the same way after a resume.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from spiking_run import RULE, SAMPLES_A_STEP, Rates, spiking
from tiny_run import tiny_config

from llm_trainer.config import CheckpointError
from llm_trainer.diagnostics.verify_resume import StopAtStep, compare_checkpoints
from llm_trainer.run_dir import list_checkpoints, verify
from llm_trainer.training.callbacks.callback import Callback
from llm_trainer.training.checkpoint.store import read_state
from llm_trainer.training.engines.train_step import TrainingDivergedError
from llm_trainer.training.logging.metrics import read_metrics
from llm_trainer.training.loss_spikes import SpikeState
from llm_trainer.training.run import TrainingRun
from llm_trainer.training.state import TrainingState


def test_outliers_are_judged_by_the_window_before_them_and_do_not_enter_it() -> None:
    training = tiny_config(Path("unused"), **RULE).training
    seen = SpikeState()
    for step, loss in enumerate([2.0, 2.1, 1.9], start=1):
        seen.update(step, loss, training)
    seen.update(4, 1000.0, training)
    assert seen.outliers == 0  # fewer than half of the window so far: no judgement
    seen = SpikeState(losses=[2.0, 2.1, 1.9, 2.0])
    assert seen.threshold(training) == pytest.approx(2.0 + 12 * math.sqrt(0.02 / 3))
    seen.update(5, 3.0, training)
    assert (seen.outliers, seen.first_outlier, len(seen.losses)) == (1, 5, 4)
    seen.update(6, 2.0, training)
    assert (seen.outliers, seen.first_outlier, len(seen.losses)) == (0, None, 5)
    seen.update(7, 3.0, training)
    seen.update(8, 3.0, training)
    assert seen.is_spike(training)
    assert seen.first_outlier == 7


def test_no_losses_are_kept_where_rollbacks_are_off() -> None:
    seen = SpikeState()
    for step in range(20):
        seen.update(step, float(step**3), tiny_config(Path("unused")).training)
    assert seen == SpikeState()


def test_a_spike_rolls_the_run_back_skips_its_data_and_keeps_the_number_of_steps(tmp_path: Path) -> None:
    trainer, lines = spiking(tmp_path)
    result = trainer.train()
    assert result.ended_by == "finished"
    assert result.step == 24
    [line] = [line for line in lines if "loss spike" in line]
    assert "loss spike at step 13: 2 steps in a row above" in line
    assert "rolled back to step 9 " in line  # the newest that is three steps before it
    assert "skipping samples up to 111" in line
    assert "rollback 1 of 2" in line
    assert trainer.run.state.samples == (24 + 14 - 9) * SAMPLES_A_STEP
    assert {one.step for one in list_checkpoints(tmp_path / "earlier-1")} == {12}


def test_the_rollback_is_in_the_metrics_which_continue_from_the_checkpoint(tmp_path: Path) -> None:
    trainer, _ = spiking(tmp_path)
    trainer.train()
    lines = read_metrics(tmp_path)
    [rollback] = [line for line in lines if "rollback" in line]
    assert (rollback["step"], rollback["rollback"], rollback["rollback_from_step"]) == (9, 1, 14)
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert [step for step, _ in losses] == list(range(1, 25))
    assert max(loss for _, loss in losses) < 10
    left = (tmp_path / "logs/metrics-before-rollback-1.jsonl").read_text(encoding="utf-8")
    assert left.count('"step": 14') == 1


def test_after_a_rollback_the_run_trains_from_that_checkpoint_on_the_data_after_the_spike(
    tmp_path: Path,
) -> None:
    """The weights equal those of a run that was resumed at the checkpoint and skips those samples."""
    trainer, _ = spiking(tmp_path / "spiked")
    trainer.train()
    start, _ = spiking(tmp_path / "by-hand", 1000, 1000, StopAtStep(9))
    start.train()

    class Leaves(Callback):
        def on_train_start(self, run: TrainingRun) -> None:
            run.state.samples = 14 * SAMPLES_A_STEP
            run._open_batches()

    by_hand, _ = spiking(tmp_path / "by-hand", 1000, 1000, Leaves(), resume_from=str(tmp_path / "by-hand"))
    by_hand.train()
    differences = compare_checkpoints(tmp_path / "spiked/final_model", tmp_path / "by-hand/final_model")
    assert [line for line in differences if not line.startswith("state ")] == []


def test_asynchronous_saves_are_written_before_the_run_rolls_back(tmp_path: Path) -> None:
    for how in ("off", "on"):
        trainer, lines = spiking(tmp_path / how, 10, 11, asynchronous_saves=how, spike_rollback_steps=1)
        trainer.train()
        assert any("rolled back to step 6 " in line for line in lines)
    assert compare_checkpoints(tmp_path / "off/final_model", tmp_path / "on/final_model") == []


def test_user_random_numbers_are_rolled_back_too(tmp_path: Path) -> None:
    class Draws(Callback):
        def __init__(self) -> None:
            self.drawn: list[tuple[int, float]] = []

        def on_step_end(self, run: TrainingRun, step: int) -> None:
            self.drawn.append((step, float(torch.rand(()))))

    draws = Draws()
    spiking(tmp_path, 13, 14, draws, model={"dropout": 0.0})[0].train()
    assert draws.drawn[9:14] == draws.drawn[14:19]


@pytest.mark.parametrize("stop", [13, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (11, 14, 16))])
def test_interrupted_before_during_and_after_the_spike_the_run_ends_as_the_uninterrupted_one(
    tmp_path: Path, stop: int
) -> None:
    straight, _ = spiking(tmp_path / "straight")
    straight.train()

    class StopsOnce(Callback):
        def on_step_end(self, run: TrainingRun, step: int) -> None:
            if step == stop and (stop != 16 or run.state.spikes.rollbacks == 1):
                run.stop()

    cut, _ = spiking(tmp_path / "cut", 13, 14, StopsOnce())
    assert cut.train().ended_by == "stopped"
    resumed, lines = spiking(tmp_path / "cut", resume_from=str(tmp_path / "cut"))
    resumed.train()
    assert sum("loss spike" in line for line in lines) == (0 if stop == 16 else 1)
    assert compare_checkpoints(tmp_path / "straight/final_model", tmp_path / "cut/final_model") == []


@pytest.mark.parametrize("stop", [15, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (14, 16))])
def test_where_losses_are_read_every_few_steps_a_save_between_two_reads_changes_nothing(
    tmp_path: Path, stop: int
) -> None:
    """As on a GPU, where a look makes the host wait; saving looks too."""
    for name, callbacks in (("straight", []), ("cut", [StopAtStep(stop)]), ("cut", [])):
        resume = {"resume_from": "auto"} if name == "cut" else {}
        trainer, lines = spiking(
            tmp_path / name, 13, 14, *callbacks, logging_steps=100, save_interval=4, **resume
        )
        trainer._read_every = 4
        trainer.train()
    assert any("loss spike" in line and "rolled back to step 8 " in line for line in lines)
    assert compare_checkpoints(tmp_path / "straight/final_model", tmp_path / "cut/final_model") == []


def test_spike_lr_factor_lowers_the_learning_rate_at_each_rollback(tmp_path: Path) -> None:
    rates = Rates()
    trainer, _ = spiking(tmp_path, 13, 14, rates, spike_lr_factor=0.5, lr_scheduler="constant")
    trainer.train()
    before = [rate for step, rate in rates.seen[:14] if step > 1]
    after = [rate for _, rate in rates.seen[14:]]
    assert set(before) == {1e-2}
    assert set(after) == {5e-3}
    assert read_state(tmp_path / "final_model")["spikes"]["rollbacks"] == 1  # type: ignore[index, call-overload]


def test_when_the_rollbacks_are_used_up_the_run_ends_with_an_error_and_its_checkpoints_stay(
    tmp_path: Path,
) -> None:
    trainer, lines = spiking(tmp_path, 13, 1000)
    with pytest.raises(
        TrainingDivergedError,
        match=r"loss spike at step \d+.*all 2 rollbacks \(max_rollbacks\) are used up.*learning_rate",
    ):
        trainer.train()
    assert sum("rolled back to step" in line for line in lines) == 2
    assert any(not verify(one.path) for one in list_checkpoints(tmp_path))


def test_a_damaged_checkpoint_is_skipped_and_without_one_the_run_continues_with_a_message(
    tmp_path: Path,
) -> None:
    class Damages(Callback):
        def on_checkpoint(self, run: TrainingRun, path: Path) -> None:
            if path.name in damaged and path.parent.name == "run":
                (path / "state.json").write_text("{}", encoding="utf-8")

    damaged = {"checkpoint-9"}
    trainer, lines = spiking(tmp_path / "a/run", 13, 14, Damages())
    trainer.train()
    assert any("skipping" in line and "checkpoint-9" in line for line in lines)
    assert any("rolled back to step 6 " in line for line in lines)
    damaged = {f"checkpoint-{step}" for step in (3, 6, 9, 12)}
    trainer, lines = spiking(tmp_path / "b/run", 13, 14, Damages())
    assert trainer.train().step == 24
    assert any("no checkpoint from before it" in line for line in lines)
    assert trainer.run.state.samples == 24 * SAMPLES_A_STEP


def test_one_bad_batch_is_not_a_spike(tmp_path: Path) -> None:
    trainer, lines = spiking(tmp_path, 13, 13)
    trainer.train()
    assert not any("loss spike" in line for line in lines)


def test_a_damaged_state_of_the_rule_is_refused() -> None:
    with pytest.raises(CheckpointError, match="does not fit"):
        TrainingState.from_json({"spikes": {"surprise": 1}})


def test_a_rollback_keeps_an_end_in_epochs_whether_interrupted_or_not(tmp_path: Path) -> None:
    length = {"max_steps": None, "num_epochs": 5}
    assert spiking(tmp_path / "straight", **length)[0].train().step == 25
    spiking(tmp_path / "cut", 13, 14, StopAtStep(12), **length)[0].train()
    spiking(tmp_path / "cut", 13, 14, StopAtStep(18), resume_from="auto", **length)[0].train()
    spiking(tmp_path / "cut", resume_from="auto", **length)[0].train()
    assert compare_checkpoints(tmp_path / "straight/final_model", tmp_path / "cut/final_model") == []
