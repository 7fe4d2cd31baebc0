"""A tiny run whose loss spikes on some samples the first time they come."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_run import tiny_trainer

from llm_trainer.data.sampling.batch import Batch
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.callbacks.callback import Callback
from llm_trainer.training.objectives.objective import LossSum, NextToken
from llm_trainer.training.run import TrainingRun
from llm_trainer.training.trainer import Trainer

SAMPLES_A_STEP = 8
RULE = {
    "max_rollbacks": 2,
    "spike_window": 8,
    "spike_sigma": 12.0,
    "spike_patience": 2,
    "spike_rollback_steps": 3,
}
RUN = RULE | {
    "max_steps": 24,
    "save_interval": 3,
    "eval_interval": 100,
    "save_total_limit": None,
    "warmup_steps": 1,
}


class SpikesOn(NextToken):
    """The loss of some samples of the run is far too high, as where bad data meets bad weights."""

    def __init__(self, trainer: Trainer, samples: range) -> None:
        super().__init__()
        self.trainer, self.samples = trainer, samples

    def __call__(self, model: Transformer, batch: Batch) -> LossSum:
        loss = super().__call__(model, batch)
        is_bad = torch.is_grad_enabled() and self.trainer.run.state.samples in self.samples
        return LossSum(loss.total * 20, loss.tokens) if is_bad else loss


class Rates(Callback):
    """The learning rate of every update, in order."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def on_step_end(self, run: TrainingRun, step: int) -> None:
        self.seen.append((step, run.engine.optimizers[-1].param_groups[0]["lr"]))


def spiking(
    folder: Path, first_step: int = 13, last_step: int = 14, *callbacks: Callback, **settings: object
) -> tuple[Trainer, list[str]]:
    """A run of 24 steps whose steps from `first_step` to `last_step` spike the first time they come; and what
    it says.
    """
    trainer = tiny_trainer(folder, callbacks=callbacks, **RUN | settings)  # type: ignore[arg-type]
    trainer.run.engine.objective = SpikesOn(
        trainer, range((first_step - 1) * SAMPLES_A_STEP, last_step * SAMPLES_A_STEP)
    )
    said: list[str] = []
    trainer.run.log = said.append  # type: ignore[method-assign]
    return trainer, said
