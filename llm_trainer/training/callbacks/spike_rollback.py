"""Undoes a loss spike: returns to a checkpoint from before it and skips the data that led there.

The remedy is PaLM's (Chowdhery et al. 2022, arXiv:2204.02311, section 5.1): restart from a checkpoint about
100 steps before the spike, and skip the batches that were seen before and during it. The same batches did no
harm from other weights, so they are not bad in themselves, but another path avoids the spike. Here all
samples between the checkpoint and the step that showed the spike are skipped. Skipping single updates
(OLMo-core, metaseq) is the alternative not taken: it cannot undo the updates that led to the spike.

The rule that detects a spike is in `loss_spikes.py`. Everything is a function of losses and of what is in the
checkpoint, so a resumed run rolls back as the uninterrupted one.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from llm_trainer.run_dir import LOGS_FOLDER, METRICS_FILE, Verify, list_checkpoints
from llm_trainer.training.checkpoint.distributed_resume import find_together
from llm_trainer.training.engines.train_step import TrainingDivergedError
from llm_trainer.training.loss_spikes import lr_factor_after_rollbacks
from llm_trainer.training.run import TrainingRun


def roll_back(run: TrainingRun) -> None:
    """Take a run back to before the spike that its state shows. A collective call between two steps.

    Without a checkpoint from before the spike the run continues, and says so.

    Args:
        run: The run.

    Raises:
        TrainingDivergedError: If `max_rollbacks` are used up.
    """
    training, spikes, step, samples = run.training, run.state.spikes, run.current_step, run.state.samples
    threshold = spikes.threshold(training)
    spike = (
        f"loss spike at step {spikes.first_outlier}: {spikes.outliers} steps in a row above {threshold:.4f}, "
        f"{training.spike_sigma:g} standard deviations over the mean of the last {len(spikes.losses)}"
    )
    if spikes.rollbacks >= training.max_rollbacks:
        raise TrainingDivergedError(
            f"{spike}; all {training.max_rollbacks} rollbacks (max_rollbacks) are used up. Lower "
            "learning_rate, "
            "raise warmup_steps or set spike_lr_factor below 1, and resume from a checkpoint before the spike"
        )
    checkpoint = find_together(run.process_group, lambda check: _checkpoint_before(run, check))
    if checkpoint is None:
        run.log(f"{spike}; there is no checkpoint from before it, so the run continues without a rollback")
        run.forget_spike()
        return
    run.process_group.run_on_main(lambda: _keep_metrics(run.run_dir, spikes.rollbacks + 1))
    run.rollback(checkpoint, skip_data=True)
    count = run.state.spikes.rollbacks
    factor = lr_factor_after_rollbacks(run.state.spikes, training)
    run.log(
        f"{spike}; rolled back to step {run.current_step} ({checkpoint}), skipping samples up to "
        f"{samples - 1}, "
        f"learning rate × {factor:g}; rollback {count} of {training.max_rollbacks}"
    )
    run.metrics_tracker.update(
        {"rollback": count, "rollback_from_step": step, "spike_threshold": threshold}, run.current_step
    )
    run.finish_pending_callbacks()


def _checkpoint_before(run: TrainingRun, check: Verify) -> Path | None:
    """The newest complete checkpoint at least `spike_rollback_steps` before the spike, else the oldest that
    is before it at all.
    """
    first = run.state.spikes.first_outlier
    assert first is not None, "a spike has a first step"
    # An update is judged by the loss after it.
    before = [one for one in list_checkpoints(run.run_dir) if one.step < first - 1]
    far = [one for one in before if one.step <= first - run.training.spike_rollback_steps]
    near = [one for one in reversed(before) if one not in far]
    for one in [*far, *near]:
        if not (problems := check(one.path)):
            return one.path
        run.log(f"skipping {one.path}: {problems[0]}")
    return None


def _keep_metrics(run_dir: Path, rollback: int) -> None:
    """Copy the metrics of the steps that are undone; `metrics.jsonl` continues from the checkpoint."""
    kept = run_dir / LOGS_FOLDER / f"metrics-before-rollback-{rollback}.jsonl"
    kept.parent.mkdir(exist_ok=True)
    shutil.copyfile(run_dir / METRICS_FILE, kept)
