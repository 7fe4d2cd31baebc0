"""An interrupted run ends bit-exactly as the uninterrupted one; changed settings are printed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_run import tiny_config, tiny_run, tiny_trainer, tokens

from llm_trainer.config import CheckpointError, UsageError
from llm_trainer.diagnostics.verify_resume import StopAtStep, compare_checkpoints, verify_resume
from llm_trainer.run_dir import list_checkpoints, verify
from llm_trainer.training.callbacks.callback import Callback
from llm_trainer.training.checkpoint.resume import compare_settings, plan_resume
from llm_trainer.training.checkpoint.store import read_state
from llm_trainer.training.engines.validation import ValidationResult
from llm_trainer.training.optim.lr_schedule import LRSchedule, LRScheduleState, RunLength
from llm_trainer.training.run import TrainingRun
from llm_trainer.training.state import TrainingState
from llm_trainer.training.trainer import Trainer


class Spy(Callback):
    """Records learning rates."""

    def __init__(self) -> None:
        self.rates: dict[int, float] = {}

    def on_step_end(self, run: TrainingRun, step: int) -> None:
        self.rates[step] = run.engine.optimizers[-1].param_groups[0]["lr"]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_interrupted_and_resumed_run_equals_the_uninterrupted_one_bit_exactly(
    tmp_path: Path, precision: str, optimizer: str, num_workers: int
) -> None:
    """Stopped in the second epoch's middle (an epoch is 5 steps), with dropout on, resumed in another
    folder's trainer.
    """
    settings = {"precision": precision, "optimizer": optimizer, "num_workers": num_workers}
    tiny_run(tmp_path / "straight", **settings)
    tiny_run(tmp_path / "cut", **settings, callbacks=[StopAtStep(4)])
    tiny_run(tmp_path / "cut", **settings, resume_from=str(tmp_path / "cut"))
    assert compare_checkpoints(tmp_path / "straight" / "final_model", tmp_path / "cut" / "final_model") == []
    assert compare_checkpoints(tmp_path / "straight" / "best_model", tmp_path / "cut" / "best_model") == []


def test_every_checkpoint_of_a_run_leads_to_the_same_end(tmp_path: Path) -> None:
    tiny_run(tmp_path / "straight", save_interval=1, save_total_limit=None)
    for step in (1, 5, 9):
        start = tmp_path / "straight" / f"checkpoint-{step}"
        tiny_run(tmp_path / f"from{step}", resume_from=str(start), save_interval=1)
        assert (
            compare_checkpoints(
                tmp_path / "straight" / "final_model", tmp_path / f"from{step}" / "final_model"
            )
            == []
        )


def test_auto_starts_in_an_empty_folder_and_resumes_in_one_with_checkpoints(tmp_path: Path) -> None:
    first = tiny_run(tmp_path, resume_from="auto", callbacks=[StopAtStep(4)])
    second = tiny_trainer(tmp_path, resume_from="auto")
    assert first.step == 4
    assert second.train().step == 10
    assert second.run.resolved.checkpoint == tmp_path / "final_model"


def test_auto_with_only_damaged_checkpoints_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    tiny_run(tmp_path)
    for one in list_checkpoints(tmp_path):
        (one.path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="all of its"):
        tiny_run(tmp_path, resume_from="auto")


def test_a_new_run_in_the_same_folder_moves_the_earlier_one_aside(tmp_path: Path) -> None:
    tiny_run(tmp_path)
    tiny_run(tmp_path, callbacks=[StopAtStep(2)])
    assert {path.name for path in (tmp_path / "earlier-1").iterdir()} >= {
        "checkpoint-9",
        "best_model",
        "final_model",
        "metrics.jsonl",
    }
    assert [one.step for one in list_checkpoints(tmp_path)] == [2]


def test_resuming_an_earlier_step_moves_later_checkpoints_aside(tmp_path: Path) -> None:
    tiny_run(tmp_path)
    tiny_run(tmp_path, resume_from=str(tmp_path / "checkpoint-3"), callbacks=[StopAtStep(5)])
    assert (tmp_path / "earlier-1" / "checkpoint-9").is_dir()
    assert max(one.step for one in list_checkpoints(tmp_path)) == 5


def test_rates_intervals_and_paths_may_change_and_are_printed(tmp_path: Path) -> None:
    old, new = (
        tiny_config(tmp_path),
        tiny_config(tmp_path / "other", learning_rate=0.5, save_interval=7, batch_size=2),
    )
    lines = [str(change) for change in compare_settings(old, new, tmp_path)]
    assert "training.learning_rate: 0.01 → 0.5" in lines
    assert "training.save_interval: 3 → 7" in lines
    assert "training.batch_size: 4 → 2" in lines


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": {"hidden_size": 32}}, "model.hidden_size: 16 → 32"),
        ({"optimizer": "muon"}, "training.optimizer: adamw → muon"),
        ({"seed": 5}, "training.seed: 1337 → 5"),
    ],
)
def test_what_the_saved_state_depends_on_may_not_change(
    tmp_path: Path, changes: dict[str, object], named: str
) -> None:
    tiny_run(tmp_path, callbacks=[StopAtStep(4)])
    with pytest.raises(UsageError, match=named):
        tiny_run(tmp_path, resume_from=str(tmp_path), **changes)


def test_a_changed_batch_size_continues_with_the_next_sample(tmp_path: Path) -> None:
    tiny_run(tmp_path, callbacks=[StopAtStep(4)])
    trainer = tiny_trainer(tmp_path, resume_from=str(tmp_path), batch_size=2, callbacks=[StopAtStep(6)])
    trainer.train()
    assert trainer.run.state.samples == 4 * 8 + 2 * 4


def test_other_data_and_another_tokenizer_are_refused_with_the_way_out(tmp_path: Path) -> None:
    tiny_run(tmp_path, callbacks=[StopAtStep(4)])
    with pytest.raises(CheckpointError, match=r"other data.*--init_from"):
        tiny_run(tmp_path, resume_from=str(tmp_path), data=tokens(seed=3))
    with pytest.raises(CheckpointError, match=r"another tokenizer.*--init_from"):
        tiny_run(tmp_path, resume_from=str(tmp_path), data=tokens(tokenizer_hash="1" * 64))


def test_a_moved_end_needs_lr_on_resume(tmp_path: Path) -> None:
    tiny_run(tmp_path, callbacks=[StopAtStep(4)])
    with pytest.raises(UsageError, match=r"from step 10 to 20.*--lr_on_resume"):
        tiny_run(tmp_path, resume_from=str(tmp_path), max_steps=20)


@pytest.mark.parametrize("settings", [{"lr_decay_steps": 10}, {"lr_scheduler": "constant"}])
def test_a_decay_that_does_not_aim_at_the_end_needs_no_lr_on_resume(
    tmp_path: Path, settings: dict[str, object]
) -> None:
    tiny_run(tmp_path, callbacks=[StopAtStep(4)], **settings)
    assert tiny_run(tmp_path, resume_from=str(tmp_path), max_steps=12, **settings).step == 12


def test_lr_on_resume_stretches_warms_up_again_or_keeps(tmp_path: Path) -> None:
    """At the old end's last step the rate is on its way (extend), at its peak again (rewarm), or where it was
    (keep).
    """
    tiny_run(tmp_path / "run", callbacks=[StopAtStep(6)], eval_interval=100)
    rates = {}
    for choice in ("extend", "rewarm", "keep"):
        spy = Spy()
        start = str(tmp_path / "run" / "final_model")
        tiny_run(
            tmp_path / choice,
            resume_from=start,
            max_steps=20,
            lr_on_resume=choice,
            callbacks=[spy],
            eval_interval=100,
        )
        rates[choice] = spy.rates
    assert rates["extend"][10] > 2 * rates["keep"][10]
    assert rates["extend"][20] == pytest.approx(1e-3, rel=0.1)
    assert rates["rewarm"][7] < rates["rewarm"][9] == pytest.approx(1e-2)
    assert rates["keep"][11] == rates["keep"][20] == pytest.approx(1e-3)


def test_lr_on_resume_stays_in_effect_for_later_resumes(tmp_path: Path) -> None:
    tiny_run(tmp_path, callbacks=[StopAtStep(6)], eval_interval=100)
    tiny_run(
        tmp_path,
        resume_from=str(tmp_path),
        max_steps=20,
        lr_on_resume="keep",
        callbacks=[StopAtStep(8)],
        eval_interval=100,
    )
    spy = Spy()
    tiny_run(tmp_path, resume_from=str(tmp_path), max_steps=20, callbacks=[spy], eval_interval=100)
    assert spy.rates[12] == spy.rates[20] == pytest.approx(1e-3)


def test_a_length_in_epochs_ends_at_the_same_sample_whatever_the_batch_size(tmp_path: Path) -> None:
    stored = TrainingState(step=10, samples=80, schedule=LRSchedule("cosine", 2, 20, 0.1), total_steps=20)
    config = tiny_config(tmp_path, max_steps=None, num_epochs=4)
    length = RunLength(steps=40, set_by="num_epochs 4", steps_per_epoch=10, tokens_per_step=32)
    plan = plan_resume(
        checkpoint=tmp_path,
        state=stored,
        changes=[],
        training=config.training,
        new_schedule=LRSchedule("cosine", 2, 40, 0.1),
        length=length,
        sequences_per_step=4,
    )
    assert plan.total_steps == 10 + (160 - 80) // 4
    assert plan.schedule.decay_steps == plan.total_steps
    assert plan.operations == LRScheduleState()


def _builder(**settings: object):  # type: ignore[no-untyped-def]
    def build(start: Path | None, folder: Path, callbacks: list[Callback]) -> Trainer:
        return tiny_trainer(
            folder, resume_from=str(start) if start else None, callbacks=callbacks, **settings
        )

    return build


def test_verify_resume_compares_with_the_runs_own_later_checkpoint(tmp_path: Path) -> None:
    tiny_run(tmp_path)
    report = verify_resume(tmp_path, 4, _builder())
    assert report.exact, str(report)
    assert (report.first_step, report.last_step) == (6, 10)
    assert len(report.comparisons) == 2
    assert not list(tmp_path.glob(".tmp-*"))


def test_verify_resume_of_a_run_that_kept_only_its_end_replays_from_the_start(tmp_path: Path) -> None:
    tiny_run(tmp_path, save_interval=None, eval_interval=100)
    report = verify_resume(tmp_path, 4, _builder(save_interval=None, eval_interval=100))
    assert report.exact, str(report)
    assert (report.first_step, report.last_step) == (0, 4)


@pytest.mark.parametrize(("eval_interval", "first", "last"), [(4, 0, 10), (8, 8, 10)])
def test_verify_resume_starts_at_the_best_model_and_compares_with_none(
    tmp_path: Path, eval_interval: int, first: int, last: int
) -> None:
    """The best model is saved during a validation: here at step 10, or at step 8 next to the end."""
    settings = {"save_interval": None, "eval_interval": eval_interval}
    tiny_run(tmp_path, callbacks=[StopAtStep(9)] if first else [], **settings)
    shutil.rmtree(tmp_path / "final_model")
    report = verify_resume(tmp_path, last - first, _builder(**settings))
    assert report.exact, str(report)
    assert (report.first_step, report.last_step, len(report.comparisons)) == (first, last, 1)


def test_verify_resume_names_what_differs(tmp_path: Path) -> None:
    """A trainer whose dropout is not a function of the step (its seed changes with every trainer) is found
    out.
    """
    tiny_run(tmp_path)
    made: list[Trainer] = []

    def build(start: Path | None, folder: Path, callbacks: list[Callback]) -> Trainer:
        trainer = _builder()(start, folder, callbacks)
        trainer.run.engine.dropout_seed = len(made)
        made.append(trainer)
        return trainer

    report = verify_resume(tmp_path, 4, build)
    assert not report.exact
    assert "transformer.wte.weight differs in" in str(report)
    assert "state.wte.weight.exp_avg differs in" in str(report)


def test_verify_resume_needs_a_complete_checkpoint_and_two_steps(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="2 or more"):
        verify_resume(tmp_path, 1, _builder())
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        verify_resume(tmp_path, 4, _builder())


def test_a_resume_into_another_folder_copies_the_best_model(tmp_path: Path) -> None:
    """The lowest loss was reached before the resumed step: the result reports it, and its model is there."""
    _best_at(tmp_path / "old", 4)
    resumed = tiny_run(
        tmp_path / "new", resume_from=str(tmp_path / "old" / "checkpoint-6"), learning_rate=0.0
    )
    assert resumed.best_validation_loss == 0.5
    assert verify(tmp_path / "new" / "best_model") == []
    assert compare_checkpoints(tmp_path / "new" / "best_model", tmp_path / "old" / "best_model") == []


@pytest.mark.parametrize("case", ["later", "damaged", "gone"])
def test_a_resume_into_another_folder_without_the_best_model_finds_its_own(tmp_path: Path, case: str) -> None:
    _best_at(tmp_path / "old", 4, *([8] if case == "later" else []))
    if case == "damaged":
        (tmp_path / "old" / "best_model" / "config.json").write_text("{}", encoding="utf-8")
    if case == "gone":
        shutil.rmtree(tmp_path / "old" / "best_model")
    resumed = tiny_run(tmp_path / "new", resume_from=str(tmp_path / "old" / "checkpoint-6"))
    assert resumed.validation is not None
    assert 0.5 < (resumed.best_validation_loss or 0) <= resumed.validation.loss
    assert read_state(tmp_path / "new" / "best_model")["best_validation_loss"] == resumed.best_validation_loss
    assert read_state(tmp_path / "new" / "best_model")["step"] in (8, 10)


def _best_at(folder: Path, *steps: int) -> None:
    """A run whose best validations are at these steps, with losses that no other reaches."""
    trainer = tiny_trainer(folder)
    real = trainer.run.evaluate

    def evaluate() -> ValidationResult:
        result = real()
        step = trainer.current_step
        return (
            ValidationResult(0.5 - 0.1 * steps.index(step), result.tokens, 1.0) if step in steps else result
        )

    trainer.run.evaluate = evaluate  # type: ignore[method-assign]
    trainer.train()
