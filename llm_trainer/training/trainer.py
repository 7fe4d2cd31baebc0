"""The one loop. Read `train` from top to bottom: prepare, step, edge of the step, end.

Pretraining, fine-tuning, distillation and scheduled growth are this Trainer with other objectives and
callbacks. The order of batches, the learning rate and dropout are functions of the step (see
`data/sampling/samplers.py`, `schedules.py`, `objectives.py`), so all that a run has to remember is
`TrainingState`, beside weights and optimizer.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from llm_trainer.config import RunConfig, UsageError
from llm_trainer.config.resolve.batch_size import micro_batch_bounds, resolve_batches
from llm_trainer.config.resolve.deepspeed import with_deepspeed_file
from llm_trainer.data.sampling.packing import Packing
from llm_trainer.data.sampling.samplers import training_sampler
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.distributed.process_group import Ranks
from llm_trainer.model.flops import estimate_flops
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.callbacks import Callback, EarlyStopping
from llm_trainer.training.checkpoint.checkpoint_policy import Saving, store_for
from llm_trainer.training.checkpoint.distributed_resume import found_to_resume
from llm_trainer.training.checkpoint.remote import fetch_resumed, use_local_folders
from llm_trainer.training.checkpoint.resume import data_identity
from llm_trainer.training.checkpoint.store import (
    CheckpointStore,
    Progress,
    Snapshot,
    restore_generators,
    write_run_file,
)
from llm_trainer.training.engines.engine import build_engine
from llm_trainer.training.engines.precision import resolve_device
from llm_trainer.training.engines.train_step import Outcomes, SampleRange, StepOutcome
from llm_trainer.training.engines.tuning import tuned
from llm_trainer.training.engines.validation import ValidationResult
from llm_trainer.training.logging.metrics import MetricsTracker
from llm_trainer.training.logging.mixture_stats import AchievedShares, count_sources
from llm_trainer.training.logging.progress import ProgressReporter
from llm_trainer.training.logging.throughput import Meter
from llm_trainer.training.loss_spikes import rate_after_rollbacks, roll_back
from llm_trainer.training.memory.batch_size_finder import open_batches, settle_micro_batch, step_within_memory
from llm_trainer.training.memory.memory_monitor import Watcher
from llm_trainer.training.objectives.objective import Objective
from llm_trainer.training.optim.lr_schedule import resolve_length, resolve_schedule
from llm_trainer.training.preemption import StopSignals
from llm_trainer.training.standing import end_edge, go_back, goes_on_here, settle_best, take_up
from llm_trainer.training.state import TrainingResult, TrainingState

_LOOK_EVERY = 10  # steps between two looks at what the device found, where a look makes the host wait


class Trainer:
    """Trains `model` on `train`, validates on `validation`, saves under the run folder
    (`config.training.output_dir`).

    `objective`: what is minimised (default: next tokens); `callbacks` come after early stopping's, which the configuration switches on;
    `store`: where checkpoints go; `cache_dir`: where what was learned about compiling here is kept between runs; `ranks`: the processes
    that train together, each with a Trainer of the same arguments, of which the main one writes and talks; `verified`: the checkpoint that
    `resume_from` means, where it has been verified. Raises UsageError for settings that do not fit together, DataError for bad data.
    """

    def __init__(
        self,
        model: Transformer,
        config: RunConfig,
        train: TokenDataset,
        validation: TokenDataset | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        objective: Objective | None = None,
        callbacks: Sequence[Callback] = (),
        store: CheckpointStore | None = None,
        console: Console | None = None,
        cache_dir: Path | None = None,
        ranks: Ranks | None = None,
        verified: Path | None = None,
    ) -> None:
        config = with_deepspeed_file(config)
        self.config, self.training = config, (training := config.training)
        use_local_folders(training)
        self.train_tokens, self.validation_tokens, self.tokenizer = train, validation, tokenizer
        self.ranks = ranks or Ranks()
        self.console = (console or Console(stderr=True)) if self.ranks.is_main else Console(quiet=True)
        self.run_dir, self.cache_dir = Path(training.output_dir), cache_dir
        self.store = store or store_for(training, is_main=self.ranks.is_main)
        self.device, self.context = resolve_device(training.device), model.config.max_position_embeddings
        self.batches = resolve_batches(training, self.ranks.data_count)
        self.micro_batch_bounds = micro_batch_bounds(config)
        self.sequences_per_step = self.batches.sequences_per_step(self.ranks.data_count)
        self.sampler = training_sampler(
            train, self.context, training.seed, config.data, tokenizer,
            sequences_per_step=self.sequences_per_step, console=self.console,
        )  # fmt: skip
        self.length = resolve_length(
            training,
            samples_per_epoch=self.sampler.samples_per_epoch,
            sequences_per_step=self.sequences_per_step,
            context=self.context,
        )
        self.engine = build_engine(model, training, objective, self.ranks, self.device)
        self.callbacks: list[Callback] = [*callbacks]
        if training.early_stopping_patience is not None:
            self.callbacks.insert(
                0, EarlyStopping(training.early_stopping_patience, training.early_stopping_min_delta)
            )
        self.state = TrainingState(
            schedule=resolve_schedule(training, self.length), total_steps=self.length.steps
        )
        self.stop_training, self.saving = False, Saving(self)
        self._look_every = 1 if self.device.type == "cpu" else _LOOK_EVERY
        self.watcher = Watcher(training, self.device, self.say)
        self._outcomes = Outcomes(training, self.say)
        self._last_validation: ValidationResult | None = None
        self._stored_scaler: dict[str, float | int] = {}
        self._verified = verified
        self.resumed_from: Path | None = None
        self._progress: ProgressReporter | None = None

    @property
    def model(self) -> Transformer:
        """The model that is being trained; cut over the ranks where the plan says so."""
        return self.engine.model

    @property
    def current_step(self) -> int:
        """Updates done so far."""
        return self.state.step

    def train(self) -> TrainingResult:
        """Train from where the run stands (its beginning, or `resume_from`) to its end; saves `final_model/`
        there.
        """
        self._prepare()
        with StopSignals() as signals:
            try:
                for callback in self.callbacks:
                    callback.on_train_start(self)
                self._begin_run()
                ended_by = "evaluated" if self.training.eval_only else self._loop(signals)
                return self._finish(ended_by, signals)
            finally:
                self.saving.leave()
                self._micro_batches.close()
                self.metrics_tracker.close()
                if self._progress is not None:
                    self._progress.close()
                    self._progress = None

    def _begin_run(self) -> None:
        """What comes before a new run's first step, and what a checkpoint has left to do."""
        first = self.state.step == 0 and not self.state.before_operations
        wanted = self.training.eval_at_start or (
            self.validation_tokens is not None and any(one.validates_at_start for one in self.callbacks)
        )
        validation = self.validate() if self.training.eval_only or (first and wanted) else None
        if not self.training.eval_only:
            if first:
                self.between_steps(validation)
            end_edge(self)

    def evaluate(self) -> ValidationResult:
        """Loss over the validation split (or `eval_iters` batches of it) as the model is now. Raises
        UsageError without one.
        """
        if self.validation_tokens is None:
            raise UsageError(
                "there is no validation split to evaluate on; prepare the data with val_ratio above 0"
            )
        return self.engine.validate(
            self.validation_tokens,
            self.training.eval_batch_size or self.batches.micro_batch_size,
            limit=self.state.changes.eval_iters or self.training.eval_iters,
            packing=Packing.of(self.config.data),
            on_batch=self._show_validation,
        )

    def _show_validation(self, batches: int) -> None:
        if self._progress is not None and batches % _LOOK_EVERY == 0:
            self._progress.note(f"validating: {batches:,} batches")

    # Before the first step.

    def _prepare(self) -> None:
        if self.training.remote_dir is not None or self.training.resume_from is not None:
            self.ranks.main_first(lambda: fetch_resumed(self.training, self.say))
        if (path := self._verified or found_to_resume(self)) is not None:
            self._stored_scaler, self.resumed_from = take_up(self, path), path
        self._open_run_folder()
        self.model.train()
        settle_micro_batch(self)
        choice = tuned(self)
        self.state.precision, self.state.compile = choice.precision, choice.compile
        self.engine.start(choice.precision, choice.compile, self._stored_scaler)
        self._micro_batches = open_batches(self)
        self._shares = AchievedShares(self.state.source_tokens)
        self.meter = Meter(self.count_arithmetic(), self.device, self.engine.precision.computing_dtype)
        self.metrics_tracker = self._open_metrics(self.state.step if self.resumed_from else None)
        if self.resumed_from is not None:
            restore_generators(self.resumed_from, self.ranks)
        self._started = time.monotonic()

    def count_arithmetic(self) -> float:
        """FLOPs of a token on one rank, as the model is now."""
        return estimate_flops(self.model.config, self.context) / self.ranks.count

    def _open_metrics(self, resumed_step: int | None) -> MetricsTracker:
        told_in = self.run_dir if self.ranks.is_main else None
        return MetricsTracker(told_in, self.training.report_to, resumed_step=resumed_step, config=self.config)

    def _open_run_folder(self) -> None:
        """Move aside what another run left there, record the settings, start telling."""
        self.ranks.wait()  # all have read what they resume from
        if not self.training.eval_only:
            self._set_aside(self.state.step if goes_on_here(self) else None)
        log_folder = self.run_dir if self.training.file_logging and self.ranks.is_main else None
        self._progress = ProgressReporter(
            self.length.steps, first_step=self.state.step, console=self.console, log_folder=log_folder
        )

    def _set_aside(self, resumed_step: int | None) -> None:
        """The main rank moves what this run does not go on from (None: it begins) out of the way, and records
        the settings.
        """

        def begin() -> Path | None:
            moved = self.store.begin(resumed_step)
            write_run_file(self.run_dir, self.config)
            return moved

        moved = self.ranks.of_main(str(self.ranks.main_does(begin) or ""))
        if moved:
            self.say(
                f"{self.run_dir} held checkpoints or records that this run does not go on from; they are in {moved} now"
            )
        settle_best(self, moved, begins=resumed_step is None)

    # A step.

    def _loop(self, signals: StopSignals) -> str:
        while self.state.step < self.length.steps and not self.stop_training:
            if not self._has_spiked:  # a resumed run may stand where it has to go back
                if not self._train_step():
                    continue
                self._edge_of_step()
            minutes = self.training.max_minutes
            is_over = minutes is not None and time.monotonic() - self._started >= 60 * minutes
            at_edge = [
                self.stop_training,
                self._has_spiked,
                self.saving.progress(),
                self.watcher.wants_emergency(),
            ]
            received, over, stop, spiked, saves, short = self.ranks.largest(
                [signals.received or 0, is_over, *at_edge]
            )
            self.stop_training = bool(stop)
            if saves in (Progress.WRITTEN, Progress.FAILED):
                self.saving.tell()
            if received:
                signals.received = signal.Signals(received)
                return "preempted"
            if over:
                return "time"
            if short:
                self.watcher.rescue(self.saving)
            if spiked and not stop:
                self.saving.tell()
                roll_back(self)
        return "stopped" if self.stop_training else "finished"

    def _train_step(self) -> bool:
        """An update; False where memory did not do for it, and it is to be tried again."""
        with self.engine.timings.of("data"):
            batches = [next(self._micro_batches) for _ in range(self.batches.gradient_accumulation_steps)]
        tokens = int(self.ranks.add([sum(int(batch.num_supervised) for batch in batches)])[0])
        factor = self.rate_factor
        result = step_within_memory(self, batches, tokens, factor)
        if result is None:
            return False
        count_sources(self.state.source_tokens, batches, self.ranks)
        samples = SampleRange(self.state.samples, self.sequences_per_step)
        self.state.step += 1
        self.state.samples += self.sequences_per_step
        self.state.tokens += self.sequences_per_step * self.context
        self.meter.add(self.sequences_per_step * self.context)
        self._outcomes.add(StepOutcome(self.state.step, samples, tokens, factor, *result))
        if self._is_look_due:
            self._outcomes.read(self.state)
        return True

    @property
    def _is_look_due(self) -> bool:
        """A function of the step alone: looks at other times (before a save) must not change when the run
        goes back at a spike.
        """
        return self.state.step % self._look_every == 0 or self.state.step >= self.length.steps

    @property
    def _has_spiked(self) -> bool:
        return self._is_look_due and self.state.spikes.is_spike(self.training)

    @property
    def rate_factor(self) -> float:
        """What the next update's peak rates are multiplied by."""
        assert self.state.schedule is not None
        return self.state.schedule.factor(self.state.step, self.state.operations) * rate_after_rollbacks(
            self.state.spikes, self.training
        )

    # The edge of a step.

    def _edge_of_step(self) -> None:
        step, is_last = self.state.step, self.state.step >= self.length.steps
        if self._progress is not None:
            self._progress.advance(step, self.length.steps)
        for callback in self.callbacks:
            callback.on_step_end(self, step)
        if step % self.training.logging_steps == 0 or is_last:
            self._outcomes.read(self.state)
            if self._outcomes.last is not None:
                self._log_metrics(float(self._outcomes.last.loss))
        interval = self.state.changes.eval_interval or self.length.in_steps(self.training.eval_interval)
        is_validation_due = step % interval == 0 or is_last
        validation = self.validate() if is_validation_due and self.validation_tokens is not None else None
        if not is_last:
            self.between_steps(validation)
            self.saving.save_if_due(wanted=is_validation_due and self.training.always_save_checkpoint)

    def between_steps(self, validation: ValidationResult | None) -> None:
        """Let the callbacks do what they do there, operations among them; `validation` is this step's, if
        there was one.
        """
        for callback in self.callbacks:
            callback.between_steps(self, self.state.step, validation)

    def _log_metrics(self, loss: float) -> None:
        """Report a step. Subclasses may add their own: `self.metrics_tracker.update({...},
        self.current_step)`.
        """
        assert self._outcomes.last is not None
        metrics = {
            "loss": loss,
            "learning_rate": self.training.learning_rate * self._outcomes.last.rate_factor,
            "gradient_norm": float(self._outcomes.last.gradient_norm),
            "tokens": float(self.state.tokens),
            **self.meter.read(),
            **self._shares.read(),
            **self.engine.timings.read(),
            **self.watcher.metrics(),
        }
        self.metrics_tracker.update(metrics, self.state.step)
        if self._progress is not None:
            self._progress.metrics(self.state.step, metrics)

    def validate(self) -> ValidationResult:
        """Evaluate, tell everybody, and save the model where it is the best so far. A collective call, at a
        step's edge.
        """
        start = time.perf_counter()
        self._outcomes.read(self.state)
        with self.engine.timings.of("evaluation"):
            result = self._last_validation = self.evaluate()
        self.metrics_tracker.update(result.metrics, self.state.step)
        self.state.last_validation_loss = result.loss
        self.say(
            f"step {self.state.step}  "
            + "  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
        )
        is_best = math.isfinite(result.loss) and (
            self.state.best_validation_loss is None or result.loss < self.state.best_validation_loss
        )
        if is_best:
            self.state.best_validation_loss = result.loss
        for callback in self.callbacks:
            callback.on_validation(self, result)
        if is_best and not self.training.eval_only:
            self.state.before_operations = True
            self.store.save_best(self.snapshot())
            self.state.before_operations = False
        self.meter.leave_out(time.perf_counter() - start)
        return result

    def snapshot(self) -> Snapshot:
        """The run as it stands at this step's edge, to be saved."""
        self._outcomes.read(self.state)
        callbacks = {
            type(callback).__name__: state for callback in self.callbacks if (state := callback.state_dict())
        }
        state = {**self.state.to_json(), "scaler": self.engine.precision.state_dict(), "callbacks": callbacks}
        state["data"] = data_identity(self.train_tokens, self.sampler)
        return Snapshot(*self.engine.kept(), state, self.config, self.tokenizer, self.ranks)

    # The end.

    def _finish(self, ended_by: str, signals: StopSignals) -> TrainingResult:
        self._outcomes.read(self.state)
        if ended_by in ("finished", "stopped"):
            for callback in self.callbacks:
                callback.on_train_end(self)
            self.store.save_final(self.snapshot())
        elif ended_by in ("preempted", "time"):
            self.saving.save(emergency=True)
        self.saving.finish()
        return TrainingResult(
            ended_by=ended_by,
            step=self.state.step,
            tokens=self.state.tokens,
            seconds=time.monotonic() - self._started,
            loss=None if self._outcomes.last is None else float(self._outcomes.last.loss),
            validation=self._last_validation,
            best_validation_loss=self.state.best_validation_loss,
            exit_status=signals.exit_status if ended_by == "preempted" else 0,
        )

    def return_to(self, path: Path) -> None:
        """Stand again where a verified checkpoint of this run was saved, in the same process; what was saved
        since is moved aside.

        Its end and rates are those that a resume there would have now. All ranks call this at a step's edge;
        `restart_batches` must follow.
        """
        go_back(self, path)
        self._outcomes = Outcomes(self.training, self.say)
        self.metrics_tracker.close()
        self._set_aside(self.state.step)
        self.metrics_tracker = self._open_metrics(self.state.step)

    def restart_batches(self) -> None:
        """Take the next batches from where `state.samples` stands now."""
        self._micro_batches.close()
        self._micro_batches = open_batches(self)
        self._shares = AchievedShares(self.state.source_tokens)
        self.engine.expect_other_memory()

    def say(self, line: str) -> None:
        """One line for the person who watches, and for the log."""
        if self._progress is not None:
            self._progress.line(line)
        else:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
