"""The training loop. Read `train` from top to bottom: prepare, step, end of step, end.

Pretraining, fine-tuning, distillation and scheduled growth are this Trainer with other objectives and
callbacks. The order of batches, the learning rate and dropout are functions of the step (`data/sampling`,
`optim/lr_schedule.py`, `objectives/objective.py`), so all that a run has to remember besides weights and
optimizer is `TrainingState`.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from llm_trainer.config import DataConfig, ModelConfig, RunConfig, TrainingConfig, UsageError
from llm_trainer.data.prepared_dataset import check_vocabulary
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.distributed.process_group import ProcessGroup
from llm_trainer.model.build import build_model
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.callbacks.callback import Callback
from llm_trainer.training.callbacks.early_stopping import EarlyStopping
from llm_trainer.training.callbacks.spike_rollback import roll_back
from llm_trainer.training.checkpoint.store import CheckpointStore, Progress
from llm_trainer.training.engines.engine import StepResult
from llm_trainer.training.engines.out_of_memory import OutOfMemory
from llm_trainer.training.engines.train_step import SampleRange, StepOutcome
from llm_trainer.training.engines.validation import ValidationResult
from llm_trainer.training.logging.metrics import MetricsTracker, check_wandb_login
from llm_trainer.training.logging.mixture_stats import count_corpus_tokens
from llm_trainer.training.objectives.objective import Objective
from llm_trainer.training.preemption import StopSignals
from llm_trainer.training.resolve_run import ResolvedRun, resolve_config, resolve_run
from llm_trainer.training.run import TrainingRun

# Steps between two reads of what the device computed, where a read makes the host wait.
_READ_EVERY = 10
# A first step that takes this long is shown at once, whatever `logging_steps` is.
_SLOW_STEP_SECONDS = 5.0


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        ended_by: finished, stopped (by a callback), time, preempted or evaluated.
        step: Optimizer updates of the run.
        tokens: Token positions consumed.
        seconds: Training time over all starts of the run.
        loss: Training loss of the last step, in nats per token; not finite if that step diverged.
        validation: The latest validation of this start.
        best_validation_loss: Lowest validation loss, in nats per token.
        exit_code: Exit code for the process.
    """

    ended_by: str
    step: int
    tokens: int
    seconds: float
    loss: float | None
    validation: ValidationResult | None
    best_validation_loss: float | None
    exit_code: int = 0


class Trainer:
    """Trains a model on a dataset, validates, and saves checkpoints under the run folder.

    The short form needs three things: `Trainer(model_config, training_config, train_dataset).train()`.

    Args:
        model: The model, or the shape of a new one. The weights of a new one are seeded by `training.seed`,
            and its vocabulary is the dataset's unless it is set.
        config: What to do: a TrainingConfig, all sections (RunConfig), or a run that is resolved already.
        train_dataset: The training split.
        eval_dataset: The validation split; without one the run does not validate.
        data_config: How rows are packed and mixed, with a TrainingConfig.
        tokenizer: Saved with every checkpoint (default: the dataset's own, where it has one).
        objective: What is minimised (default: next-token cross-entropy).
        callbacks: Called after the one for early stopping, which the settings switch on.
        store: Where checkpoints go (default: the run folder, `training.output_dir`).
        console: Where lines for the user go (default: stderr).
        cache_dir: Folder that keeps what compilations cost and gained, for `autotune`.
        process_group: The ranks that train together, each with a Trainer of the same arguments. The main one
            writes and prints.

    Attributes:
        run: The state of the training.

    Raises:
        UsageError: For settings that do not fit together.
        DataError: For data that does not fit.
        CheckpointError: If a checkpoint to resume from does not exist or is damaged.
    """

    def __init__(
        self,
        model: Transformer | ModelConfig,
        config: TrainingConfig | RunConfig | ResolvedRun,
        train_dataset: TokenDataset,
        eval_dataset: TokenDataset | None = None,
        *,
        data_config: DataConfig | None = None,
        tokenizer: Tokenizer | None = None,
        objective: Objective | None = None,
        callbacks: Sequence[Callback] = (),
        store: CheckpointStore | None = None,
        console: Console | None = None,
        cache_dir: Path | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        tokenizer = tokenizer or getattr(train_dataset, "tokenizer", None)
        if isinstance(config, ResolvedRun):
            resolved = config
            assert isinstance(model, Transformer), "a resolved run comes with its model"
        else:
            model, resolved = _resolve(
                model, config, train_dataset, data_config, tokenizer, process_group or ProcessGroup(), console
            )
        training = resolved.training
        own: list[Callback] = []
        if training.early_stopping_patience is not None:
            own.append(EarlyStopping(training.early_stopping_patience, training.early_stopping_min_delta))
        self.callbacks: list[Callback] = [*own, *callbacks]
        self.cache_dir = cache_dir
        self.run = TrainingRun(
            resolved,
            model,
            train_dataset,
            eval_dataset,
            tokenizer=tokenizer,
            objective=objective,
            callbacks=self.callbacks,
            store=store,
            console=console,
        )
        self._first_step = 1
        self._read_every = 1 if self.run.device.type == "cpu" else _READ_EVERY

    @property
    def model(self) -> Transformer:
        """The model in training; sharded over the ranks where the plan says so."""
        return self.run.model

    @property
    def current_step(self) -> int:
        """Optimizer updates so far."""
        return self.run.current_step

    @property
    def metrics_tracker(self) -> MetricsTracker:
        """Where metrics go: `self.metrics_tracker.update({"custom/metric": 1.0}, self.current_step)`."""
        return self.run.metrics_tracker

    def train(self) -> TrainingResult:
        """Train to the end of the run, from its start or from the checkpoint that it resumes from.

        Returns:
            How the run ended. `final_model/` is saved unless it was interrupted.

        Raises:
            CheckpointError: If another process trains in the run folder, or a save failed.
        """
        run = self.run
        try:
            self._prepare()
            with StopSignals() as signals:
                for callback in self.callbacks:
                    callback.on_train_start(run)
                self._before_first_step()
                ended_by = "evaluated" if run.training.eval_only else self._loop(signals)
                return self._finish(ended_by, signals)
        finally:
            run.close()

    def evaluate(self) -> ValidationResult:
        """The loss over the validation split as the model is now.

        Raises:
            UsageError: If there is no validation split.
        """
        return self.run.evaluate()

    # Prepare.

    def _prepare(self) -> None:
        run = self.run
        run.process_group.run_on_main(lambda: check_wandb_login(run.training.report_to))
        run.lock_run_dir()
        if run.resolved.checkpoint is not None:
            run.resume(run.resolved.checkpoint)
        run.open_run_dir()
        run.start(self.cache_dir)

    def _before_first_step(self) -> None:
        """Validate a new run if asked to, and call the callbacks that come before the first step."""
        run = self.run
        is_new = run.current_step == 0 and not run.state.between_steps_pending
        wanted = run.training.eval_at_start or (
            run.eval_dataset is not None and any(one.validates_at_start for one in self.callbacks)
        )
        validation = run.validate() if run.training.eval_only or (is_new and wanted) else None
        if not run.training.eval_only:
            if is_new:
                run.call_between_steps(validation)
            run.finish_pending_callbacks()

    # Step.

    def _loop(self, signals: StopSignals) -> str:
        run = self.run
        self._first_step = run.current_step + 1
        while run.current_step < run.length.steps and not run.stop_requested:
            if not self._has_spiked:  # a resumed run may be where it has to roll back
                if not self._train_step():
                    continue  # out of memory: repeat the step with smaller micro-batches
                self._end_of_step()
            minutes = run.training.max_minutes
            is_over = minutes is not None and run.seconds_since_start >= 60 * minutes
            mine = [
                signals.received or 0,
                is_over,
                run.stop_requested,
                self._has_spiked,
                run.save_progress,
                run.monitor.take_emergency(),
            ]
            received, over, stop, spiked, saves, low_memory = run.process_group.all_reduce_max(mine)
            if stop:
                run.stop()
            if saves in (Progress.WRITTEN, Progress.FAILED):
                run.report_saves()
            if received:
                signals.received = signal.Signals(received)
                return "preempted"
            if over:
                return "time"
            if low_memory:
                run.log(f"memory is nearly used up: {run.monitor.describe()}; saving an emergency checkpoint")
                run.save(emergency=True)
            if spiked and not stop:
                run.report_saves()
                roll_back(run)
        return "stopped" if run.stop_requested else "finished"

    def _train_step(self) -> bool:
        """One update. False if it ran out of memory and is to be repeated with smaller micro-batches."""
        run, state = self.run, self.run.state
        with run.engine.timings.measure("data"):
            batches = run.next_batches()
        supervised = sum(int(batch.num_supervised) for batch in batches)
        tokens = int(run.process_group.all_reduce_sum([supervised])[0])
        factor, sequences = run.lr_factor, run.sequences_per_step
        try:
            result: StepResult = run.engine.step(batches, tokens, lr_factor=factor, index=state.step)
        except OutOfMemory as error:
            run.retry_with_smaller_batches(error)
            return False
        count_corpus_tokens(state.source_tokens, batches, run.process_group)
        samples = SampleRange(state.samples, sequences)
        state.step += 1
        state.samples += sequences
        state.tokens += sequences * run.context
        run.meter.add(sequences * run.context)
        run.outcomes.add(StepOutcome(state.step, samples, tokens, factor, *result))
        if self._is_read_due:
            run.outcomes.flush(state)
        return True

    @property
    def _is_read_due(self) -> bool:
        """A function of the step alone: reads at other times (before a save) must not change when a run rolls
        back.
        """
        return self.run.current_step % self._read_every == 0 or self._is_last_step

    @property
    def _is_last_step(self) -> bool:
        return self.run.current_step >= self.run.length.steps

    @property
    def _has_spiked(self) -> bool:
        return self._is_read_due and self.run.state.spikes.is_spike(self.run.training)

    # End of step.

    def _end_of_step(self) -> None:
        run, step, is_last = self.run, self.run.current_step, self._is_last_step
        run.show_step()
        for callback in self.callbacks:
            callback.on_step_end(run, step)
        if step % run.training.logging_steps == 0 or is_last:
            run.outcomes.flush(run.state)
            if run.outcomes.last is not None:
                self._log_metrics(self._last_loss)
        elif step == self._first_step:  # a sign of life where steps are slow; not in metrics.jsonl
            run.outcomes.flush(run.state)
            if run.seconds_since_start >= _SLOW_STEP_SECONDS:
                run.show_metrics({"loss": self._last_loss, **self._step_metrics()})
        is_validation_due = step % run.eval_interval == 0 or is_last
        validation = run.validate() if is_validation_due and run.eval_dataset is not None else None
        if not is_last:
            run.call_between_steps(validation)
            run.save_if_due(wanted=is_validation_due and run.training.always_save_checkpoint)

    def _log_metrics(self, loss: float) -> None:
        """Log the metrics of a step. A subclass may add its own:
        `self.metrics_tracker.update({...}, self.current_step)`.

        Args:
            loss: The step's loss. One that is not finite is printed and not recorded.
        """
        run = self.run
        metrics = {
            **self._step_metrics(),
            "tokens": float(run.state.tokens),
            "skipped_steps": float(run.state.skipped_steps),
            **run.meter.read(),
            **run.mixture_metrics(),
            **run.engine.timings.read(),
            **run.monitor.metrics(),
        }
        recorded = {"loss": loss, **metrics} if math.isfinite(loss) else metrics
        run.metrics_tracker.update(recorded, run.current_step)
        run.show_metrics({"loss": loss, **metrics})

    def _step_metrics(self) -> dict[str, float]:
        """Learning rate and gradient norm (if finite) of the last step; empty before it has been read."""
        last = self.run.outcomes.last
        if last is None:
            return {}
        metrics = {"learning_rate": self.run.training.learning_rate * last.lr_factor}
        norm = float(last.gradient_norm)
        return {**metrics, "gradient_norm": norm} if last.tokens and math.isfinite(norm) else metrics

    @property
    def _last_loss(self) -> float:
        """The loss of the last step; NaN if it had no supervised token, or has not been read."""
        last = self.run.outcomes.last
        return float(last.loss) if last is not None and last.tokens else math.nan

    # End.

    def _finish(self, ended_by: str, signals: StopSignals) -> TrainingResult:
        run = self.run
        run.outcomes.flush(run.state)
        if ended_by in ("finished", "stopped"):
            for callback in self.callbacks:
                callback.on_train_end(run)
            run.store.save_final(run.snapshot())
        elif ended_by in ("preempted", "time"):
            run.save(emergency=True)
        run.finish_saves()
        return TrainingResult(
            ended_by=ended_by,
            step=run.current_step,
            tokens=run.state.tokens,
            seconds=run.seconds,
            loss=None if run.outcomes.last is None else self._last_loss,
            validation=run.last_validation,
            best_validation_loss=run.state.best_validation_loss,
            exit_code=signals.exit_code if ended_by == "preempted" else 0,
        )


def _resolve(
    model: Transformer | ModelConfig,
    config: TrainingConfig | RunConfig,
    train_dataset: TokenDataset,
    data_config: DataConfig | None,
    tokenizer: Tokenizer | None,
    process_group: ProcessGroup,
    console: Console | None,
) -> tuple[Transformer, ResolvedRun]:
    """The model and the resolved run of a caller who passes plain configurations."""
    if isinstance(config, TrainingConfig):
        shape = model if isinstance(model, ModelConfig) else model.config
        config = RunConfig(model=shape, training=config, data=data_config or DataConfig())
    elif data_config is not None:
        raise UsageError("data_config is given twice: a RunConfig has a section data already; leave one out")
    if isinstance(model, ModelConfig):
        if not model.is_set("vocab_size"):
            model = model.model_copy(update={"vocab_size": train_dataset.vocab_size})
        check_vocabulary(train_dataset, model.vocab_size)
        model = build_model(model, config.training.seed)
    quiet = console or Console(stderr=True, quiet=not process_group.is_main)
    settings, checkpoint = resolve_config(
        config.model_copy(update={"model": model.config}),
        process_group,
        lambda line: quiet.print(line, highlight=False, markup=False, soft_wrap=True),
    )
    resolved = resolve_run(
        settings,
        train_dataset,
        context=model.config.max_position_embeddings,
        tokenizer=tokenizer,
        checkpoint=checkpoint,
        process_group=process_group,
        console=console,
    )
    return model, resolved
