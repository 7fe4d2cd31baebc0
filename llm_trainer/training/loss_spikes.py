"""Loss spikes: seen by a rule, undone by going back to a checkpoint from before them and leaving out the data
that led there.

What counts: a step's loss is an outlier when it lies more than `spike_sigma` standard deviations above the mean of the last
`spike_window` steps (rule and constants, 6 and 128, are OLMo-core's `SkipStepOptimizer`'s), and `spike_patience` outliers in a row are a
spike (llm-foundry's `KillLossSpike` waits for four): one odd batch is over with the next step and needs no going back. Outliers do not
enter the window, so a loss that stays up cannot raise its own bar.

What is done is PaLM's remedy (Chowdhery et al. 2022, arXiv:2204.02311, section 5.1): go back to a checkpoint
about 100 steps before the spike, and leave out the batches that were seen before and during it. The same
batches did no harm there from other weights, so they are not bad in themselves, but another path avoids the
spike. Here all samples between the checkpoint and the step that showed the spike are left out. Skipping
single updates (OLMo-core, metaseq) is the alternative not taken: it cannot undo the updates that led to the
spike.

Everything is a function of losses and of what is in the checkpoint, so a run that is resumed anywhere goes
back as the uninterrupted one.
"""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.run_dir import LOGS_FOLDER, METRICS_FILE, FoundCheckpoint, Verify, list_checkpoints

if TYPE_CHECKING:
    from llm_trainer.config import TrainingConfig
    from llm_trainer.training.trainer import Trainer


@dataclass
class SpikeState:
    """What the rule has seen: the `losses` of its window (nats a token), the `outliers` in a row and the step
    of the first, how often the run went back, and how many samples were left out by that.
    """

    losses: list[float] = field(default_factory=list)
    outliers: int = 0
    first_outlier: int | None = None
    rollbacks: int = 0
    left_out: int = 0

    @classmethod
    def from_json(cls, stored: Mapping[str, object]) -> SpikeState:
        """Read a checkpoint's; raises TypeError for names that are none of these."""
        return cls(**stored)  # type: ignore[arg-type]

    def afresh(self) -> SpikeState:
        """An empty window, in the same run."""
        return SpikeState(rollbacks=self.rollbacks, left_out=self.left_out)

    def see(self, step: int, loss: float, training: TrainingConfig) -> None:
        """Judge the loss of a step; nothing is kept where `max_rollbacks` is 0."""
        if training.max_rollbacks == 0 or self.is_spike(training):
            return
        if loss > self.threshold(training):
            self.first_outlier = self.first_outlier or step
            self.outliers += 1
            return
        self.outliers, self.first_outlier = 0, None
        self.losses = [*self.losses, loss][-training.spike_window :]

    def threshold(self, training: TrainingConfig) -> float:
        """Losses above this are outliers; infinite until half of the window is filled."""
        if len(self.losses) < max(2, training.spike_window // 2):
            return math.inf
        return statistics.fmean(self.losses) + training.spike_sigma * statistics.stdev(self.losses)

    def is_spike(self, training: TrainingConfig) -> bool:
        """Whether it is time to go back."""
        return training.max_rollbacks > 0 and training.spike_patience <= self.outliers


def rate_after_rollbacks(state: SpikeState, training: TrainingConfig) -> float:
    """What the learning rate is multiplied by, after so many rollbacks."""
    return float(training.spike_rate_factor**state.rollbacks)


def roll_back(trainer: Trainer) -> None:
    """Take the run back to before the spike that `trainer.state` tells of. All ranks call this at a step's
    edge.

    Without a checkpoint from before the spike the run goes on, and says so. Raises TrainingDiverged when
    `max_rollbacks` are used up.
    """
    from llm_trainer.training.checkpoint.distributed_resume import found_together
    from llm_trainer.training.engines.train_step import TrainingDiverged
    from llm_trainer.training.standing import end_edge

    training, seen, now = trainer.training, trainer.state.spikes, trainer.state
    told = (
        f"loss spike at step {seen.first_outlier}: {seen.outliers} steps in a row above {seen.threshold(training):.4f}, "
        f"{training.spike_sigma:g} standard deviations over the mean of the {len(seen.losses)} before"
    )
    if seen.rollbacks >= training.max_rollbacks:
        raise TrainingDiverged(
            f"{told}; the {training.max_rollbacks} rollbacks of max_rollbacks are used up. Lower learning_rate, raise warmup_steps or set "
            "spike_rate_factor below 1, and go on from a checkpoint before the spike with --resume"
        )
    place = found_together(trainer.ranks, lambda check: _checkpoint_before(trainer, check))
    if place is None:
        trainer.say(f"{told}; there is no checkpoint from before it to go back to, so the run goes on")
        trainer.state.spikes = seen.afresh()
        return
    trainer.ranks.main_does(lambda: _keep_metrics(trainer.run_dir, seen.rollbacks + 1))
    trainer.return_to(place)
    back = trainer.state
    left_out = back.spikes.left_out + now.samples - back.samples
    back.samples, back.tokens, back.source_tokens = now.samples, now.tokens, now.source_tokens
    back.spikes = replace(back.spikes, rollbacks=seen.rollbacks + 1, left_out=left_out)
    trainer.restart_batches()
    trainer.say(
        f"{told}; back at step {back.step} ({place}), with samples up to {now.samples - 1} left out and the learning rate × "
        f"{rate_after_rollbacks(back.spikes, training):g}; rollback {back.spikes.rollbacks} of {training.max_rollbacks}"
    )
    numbers = {
        "rollback": back.spikes.rollbacks,
        "rollback_from_step": now.step,
        "spike_threshold": seen.threshold(training),
    }
    trainer.metrics_tracker.update(numbers, back.step)
    end_edge(trainer)


def _checkpoint_before(trainer: Trainer, check: Verify) -> Path | None:
    """The newest whole checkpoint at least `spike_distance` steps before the spike, else the oldest that is
    before it at all.
    """
    first = trainer.state.spikes.first_outlier
    assert first is not None, "a spike has a first step"
    before = [
        one for one in list_checkpoints(trainer.run_dir) if one.step < first - 1
    ]  # an update is judged by the loss after it
    far = [one for one in before if one.step <= first - trainer.training.spike_distance]
    near = [one for one in reversed(before) if one not in far]
    return next((one.path for one in [*far, *near] if _is_whole(trainer, one, check)), None)


def _is_whole(trainer: Trainer, one: FoundCheckpoint, check: Verify) -> bool:
    problems = check(one.path)
    if problems:
        trainer.say(f"passing over {one.path}: {problems[0]}")
    return not problems


def _keep_metrics(run_folder: Path, rollback: int) -> None:
    """A copy of what was measured on the way that is now left; `metrics.jsonl` goes on from the checkpoint."""
    kept = run_folder / LOGS_FOLDER / f"metrics-before-rollback-{rollback}.jsonl"
    kept.parent.mkdir(exist_ok=True)
    shutil.copyfile(run_folder / METRICS_FILE, kept)
