"""The methods of TrainingRun that change a run between two steps, and what a checkpoint of it stores."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import SHAPE, tiny_run, tiny_trainer

from llm_trainer.config import UsageError
from llm_trainer.config.resolve.batch_size import BatchPlan
from llm_trainer.config.saved_run import RENAMED_SETTINGS
from llm_trainer.config.schema.scaling_schedule import Operation
from llm_trainer.diagnostics.verify_resume import StopAtStep, compare_checkpoints
from llm_trainer.model.surgery.depth import stack_layers
from llm_trainer.orchestration.orchestrator import Orchestrator
from llm_trainer.run_dir import list_checkpoints, write_manifest
from llm_trainer.training.callbacks.callback import Callback
from llm_trainer.training.checkpoint.store import read_state
from llm_trainer.training.loss_spikes import SpikeState
from llm_trainer.training.run import TrainingRun
from llm_trainer.training.trainer import Trainer


class Between(Callback):
    """Calls a function with the run after one step."""

    def __init__(self, step: int, change: object) -> None:
        self.step, self.change = step, change

    def between_steps(self, run: TrainingRun, step: int, validation: object) -> None:
        if step == self.step:
            self.step = -1
            self.change(run)  # type: ignore[operator]


def changed(folder: Path, step: int, change: object, **settings: object) -> Trainer:
    """A run that a function changed after one step, trained to its end."""
    trainer = tiny_trainer(folder, callbacks=[Between(step, change)], **settings)  # type: ignore[arg-type]
    trainer.train()
    return trainer


# Batches.


def test_set_batches_keeps_the_number_of_steps_that_is_set(tmp_path: Path) -> None:
    trainer = changed(tmp_path, 4, lambda run: run.set_batches(BatchPlan(2, 2)))
    assert trainer.run.state.samples == 4 * 8 + 6 * 4
    overrides = trainer.run.state.overrides
    assert (overrides.micro_batch_size, overrides.sequences_per_step) == (2, 4)


def test_set_batches_keeps_the_samples_of_a_length_in_epochs(tmp_path: Path) -> None:
    length = {"max_steps": None, "num_epochs": 2}
    trainer = changed(tmp_path, 4, lambda run: run.set_batches(BatchPlan(2, 2)), **length)
    run = trainer.run
    assert run.state.samples == 80
    assert run.current_step == run.length.steps == run.state.total_steps == 4 + 6 * 2
    assert run.state.schedule is not None
    assert run.state.schedule.decay_steps == 16
    assert run.length.steps_per_epoch == run.sampler.samples_per_epoch / 4
    assert run.length.tokens_per_step == 4 * 8


def test_another_division_of_the_same_step_changes_nothing_else(tmp_path: Path) -> None:
    settings = {"model": {"dropout": 0.0}}
    trainer = changed(tmp_path, 4, lambda run: run.set_batches(BatchPlan(2, 4)), **settings)
    assert trainer.run.state.samples == 80
    assert trainer.run.sequences_per_step == 8


# Learning rate and validation.


def test_set_lr_changes_peak_and_warm_up_and_leaves_the_settings_as_they_are(tmp_path: Path) -> None:
    trainer = changed(tmp_path, 4, lambda run: run.set_lr(0.005, warmup_steps=3))
    run = trainer.run
    assert (run.state.operations.factor, run.state.operations.offset) == (0.5, 0)
    assert run.state.schedule is not None
    assert run.state.schedule.warmup_steps == 3
    assert run.training.learning_rate == 1e-2


def test_set_lr_restarts_warm_up_and_decay_if_asked_to(tmp_path: Path) -> None:
    factors: list[float] = []

    def restart(run: TrainingRun) -> None:
        first = run.state.schedule
        assert first is not None
        run.set_lr(1e-2, warmup_steps=2, restart=True)
        factors.extend([run.lr_factor, first.factor(0, replace(run.state.operations, offset=0))])

    trainer = changed(tmp_path, 6, restart, lr_decay_steps=100)
    assert trainer.run.state.operations.offset == 6
    assert factors[0] == factors[1]


def test_set_evaluation_overrides_what_changed_alone(tmp_path: Path) -> None:
    trainer = changed(tmp_path, 4, lambda run: run.set_evaluation(eval_interval=3, eval_iters=None))
    overrides = trainer.run.state.overrides
    assert (overrides.eval_interval, overrides.eval_iters) == (3, None)
    assert (trainer.run.eval_interval, trainer.run.training.eval_iters) == (3, None)


# The model.


def test_restructure_trains_the_changed_model_and_forgets_past_losses(tmp_path: Path) -> None:
    def grow(run: TrainingRun) -> None:
        run.state.spikes = SpikeState(losses=[3.0, 3.1], outliers=1, first_outlier=4, rollbacks=1)
        flops = run.meter.flops_per_token
        run.restructure(lambda state: stack_layers(state, [0, 0, 1, 1]))
        assert run.state.spikes == SpikeState(rollbacks=1)
        assert run.meter.flops_per_token > 1.5 * flops

    trainer = changed(tmp_path, 4, grow)
    assert trainer.model.config.num_hidden_layers == 4
    assert trainer.current_step == 10
    assert trainer.run.config.model.num_hidden_layers == SHAPE["num_layers"]


def test_restructure_stores_what_is_frozen_and_keeps_its_optimizer_state(tmp_path: Path) -> None:
    name = "blocks.0.mlp.up_proj.weight"
    trainer = changed(
        tmp_path, 4, lambda run: run.restructure(lambda state: replace(state, frozen=frozenset({name})))
    )
    assert trainer.run.state.overrides.frozen == [name]
    assert trainer.run.state.overrides.frozen_with_state == [name]
    assert read_state(tmp_path / "final_model")["overrides"]["frozen"] == [name]  # type: ignore[index, call-overload]


# Rollback.


def test_a_rollback_repeats_the_steps_since_the_checkpoint_exactly(tmp_path: Path) -> None:
    tiny_run(tmp_path / "straight")
    rolled = changed(tmp_path / "rolled", 5, lambda run: run.rollback(tmp_path / "rolled" / "checkpoint-3"))
    assert rolled.run.state.samples == 80
    assert compare_checkpoints(tmp_path / "straight/final_model", tmp_path / "rolled/final_model") == []


def test_a_rollback_undoes_changes_and_moves_later_checkpoints_aside(tmp_path: Path) -> None:
    def grow_and_return(run: TrainingRun) -> None:
        run.restructure(lambda state: stack_layers(state, [0, 0, 1, 1]))
        run.set_batches(BatchPlan(2, 2))
        run.save()
        run.rollback(tmp_path / "run" / "checkpoint-3")
        assert run.current_step == 3
        assert run.model.config.num_hidden_layers == 2
        assert run.batches == BatchPlan(4, 2)
        assert [one.step for one in list_checkpoints(tmp_path / "run")] == [3]

    changed(tmp_path / "run", 5, grow_and_return, eval_interval=100)
    assert (tmp_path / "run/earlier-1/checkpoint-5").is_dir()
    tiny_run(tmp_path / "straight", eval_interval=100)
    assert compare_checkpoints(tmp_path / "straight/final_model", tmp_path / "run/final_model") == []


def test_a_rollback_that_skips_data_continues_with_the_next_samples(tmp_path: Path) -> None:
    def skip(run: TrainingRun) -> None:
        run.rollback(tmp_path / "checkpoint-3", skip_data=True)
        assert (run.current_step, run.state.samples, run.state.tokens) == (3, 5 * 8, 5 * 8 * 8)
        assert (run.state.spikes.rollbacks, run.state.spikes.skipped_samples) == (1, 2 * 8)

    trainer = changed(tmp_path, 5, skip)
    assert trainer.run.state.samples == (10 + 2) * 8


# Saves.


def test_each_kind_of_save_has_its_name(tmp_path: Path) -> None:
    def save(run: TrainingRun) -> None:
        run.save()
        run.save(ephemeral=True)
        run.save(emergency=True)
        run.report_saves()

    changed(tmp_path, 5, save, save_interval=None, eval_interval=100)
    names = {one.path.name for one in list_checkpoints(tmp_path) if one.step == 5}
    assert names == {"checkpoint-5", "recent-5", "emergency-5"}


def test_a_run_without_a_validation_split_cannot_be_evaluated(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    trainer.run.eval_dataset = None
    with pytest.raises(UsageError, match="no validation split"):
        trainer.run.evaluate()


# Time.


class Waits(Callback):
    """Lets every step take some time."""

    def on_step_end(self, run: TrainingRun, step: int) -> None:
        time.sleep(0.05)


def test_training_time_accumulates_over_a_resume(tmp_path: Path) -> None:
    first = tiny_run(tmp_path, callbacks=[Waits(), StopAtStep(4)])
    stored = read_state(tmp_path / "final_model")["seconds"]
    assert isinstance(stored, float)
    assert 4 * 0.05 <= stored <= first.seconds
    trainer = tiny_trainer(tmp_path, callbacks=[Waits()], resume_from=str(tmp_path))
    second = trainer.train()
    assert trainer.run.seconds_since_start >= 6 * 0.05
    assert second.seconds >= stored + 6 * 0.05
    total = read_state(tmp_path / "final_model")["seconds"]
    assert isinstance(total, float)
    assert stored + 6 * 0.05 <= total <= second.seconds


def test_a_rollback_does_not_turn_training_time_back(tmp_path: Path) -> None:
    def roll_back(run: TrainingRun) -> None:
        before = run.seconds
        time.sleep(0.05)
        run.rollback(tmp_path / "checkpoint-3")
        assert run.seconds >= before + 0.05

    result = changed(tmp_path, 5, roll_back).run
    assert read_state(tmp_path / "final_model")["seconds"] == pytest.approx(result.seconds, abs=1.0)


# Checkpoints of earlier versions.

SCHEDULE = [
    Operation(name="freeze_layer", value=["mlp.0"], max_wait_iters=3),
    Operation(name="change_batch_size", value=0.5, max_wait_iters=1),
    Operation(name="unfreeze_layer", value=["mlp.0"], max_wait_iters=4),
]
EARLIER_STATE = {"overrides": "changes", "between_steps_pending": "before_operations"}
EARLIER_INNER = {
    "changes": {"frozen_with_state": "resting"},
    "spikes": {"skipped_samples": "left_out"},
}


def rename_to_earlier_version(checkpoint: Path) -> None:
    """Write a checkpoint's state.json and run.json as an earlier version wrote them."""
    state_file, run_file = checkpoint / "state.json", checkpoint / "run.json"
    state = json.loads(state_file.read_text(encoding="utf-8"))
    state = {EARLIER_STATE.get(name, name): value for name, value in state.items()}
    for section, names in EARLIER_INNER.items():
        assert names.keys() <= state[section].keys()
        state[section] = {names.get(name, name): value for name, value in state[section].items()}
    state_file.write_text(json.dumps(state), encoding="utf-8")
    settings = json.loads(run_file.read_text(encoding="utf-8"))
    for section, renamed in RENAMED_SETTINGS.items():
        earlier = {new: old for old, new in renamed.items()}
        settings[section] = {earlier.get(name, name): value for name, value in settings[section].items()}
    run_file.write_text(json.dumps(settings), encoding="utf-8")
    write_manifest(checkpoint)


@pytest.mark.parametrize("step", [4, 6])
def test_a_checkpoint_of_an_earlier_version_resumes_bit_exactly(tmp_path: Path, step: int) -> None:
    settings: dict[str, object] = {
        "save_interval": 1,
        "save_total_limit": None,
        "eval_interval": 3,
        "ephemeral_save_limit": 2,
        "max_rollbacks": 1,
    }
    trainer = tiny_trainer(tmp_path / "straight", callbacks=[Orchestrator(SCHEDULE)], **settings)  # type: ignore[arg-type]
    trainer.train()
    checkpoint = tmp_path / "straight" / f"checkpoint-{step}"
    assert read_state(checkpoint)["overrides"]["frozen_with_state"]  # type: ignore[index, call-overload]
    rename_to_earlier_version(checkpoint)
    assert "resting" in (checkpoint / "state.json").read_text(encoding="utf-8")
    assert "spike_distance" in (checkpoint / "run.json").read_text(encoding="utf-8")
    resumed = tiny_trainer(
        tmp_path / "resumed",
        callbacks=[Orchestrator(SCHEDULE)],
        resume_from=str(checkpoint),
        **settings,  # type: ignore[arg-type]
    )
    resumed.train()
    assert compare_checkpoints(tmp_path / "straight/final_model", tmp_path / "resumed/final_model") == []


def test_callbacks_that_were_pending_in_an_earlier_version_run_after_the_resume(tmp_path: Path) -> None:
    tiny_run(tmp_path / "straight", eval_interval=4, callbacks=[StopAtStep(4)])
    best = tmp_path / "straight" / "best_model"
    assert read_state(best)["between_steps_pending"] is True
    rename_to_earlier_version(best)
    seen: list[int] = []

    class Records(Callback):
        def between_steps(self, run: TrainingRun, step: int, validation: object) -> None:
            seen.append(step)

    tiny_run(tmp_path / "resumed", eval_interval=4, resume_from=str(best), callbacks=[Records()])
    assert seen == list(range(4, 10))
