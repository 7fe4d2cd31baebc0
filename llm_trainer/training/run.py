"""The state of a training that others may see, and the methods that change it.

Callbacks, scaling schedules, spike rollback and diagnostics take a `TrainingRun`, never the `Trainer`, and
call its methods instead of assigning its fields. All methods are for between two steps, and all ranks call
them alike.

What a user has set stays as it is (`resolved.config`, run.json). What operations change while the run trains
is in `state.overrides`, on top of it, and so in every checkpoint. The shape that a model has grown to is in
the checkpoint's own config.json, and a resumed run takes it from there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, cast

from rich.console import Console

from llm_trainer.config import UsageError
from llm_trainer.config.resolve.batch_size import BatchPlan, MicroBatchBounds
from llm_trainer.data.sampling.batch import Batch
from llm_trainer.data.sampling.packing import Packing
from llm_trainer.data.sampling.prefetch import Prefetcher
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.distributed.context_parallel import shard_batch
from llm_trainer.model.flops import estimate_flops
from llm_trainer.model.hf.checkpoint import empty_model, read_config
from llm_trainer.model.hf.config import with_explicit_values
from llm_trainer.model.surgery.model_state import ModelState
from llm_trainer.model.transformer import Transformer
from llm_trainer.run_dir import BEST_MODEL, FINAL_MODEL, JSON
from llm_trainer.training.checkpoint.atomic_fs import copy_checkpoint
from llm_trainer.training.checkpoint.checkpoint_policy import CheckpointPolicy, best_model_of, build_store
from llm_trainer.training.checkpoint.resume import data_identity, read_resumption
from llm_trainer.training.checkpoint.store import (
    CheckpointData,
    CheckpointStore,
    Progress,
    restore,
    restore_rng_state,
    write_run_file,
)
from llm_trainer.training.engines.autotune import TuneResult, WorkLeft
from llm_trainer.training.engines.build_engine import build_engine
from llm_trainer.training.engines.engine import frozen_names
from llm_trainer.training.engines.out_of_memory import OutOfMemory
from llm_trainer.training.engines.precision import PrecisionName
from llm_trainer.training.engines.train_step import Outcomes
from llm_trainer.training.engines.validation import ValidationResult
from llm_trainer.training.logging.metrics import MetricsTracker
from llm_trainer.training.logging.mixture_stats import MixtureStats
from llm_trainer.training.logging.progress import ProgressReporter
from llm_trainer.training.logging.throughput import ThroughputMeter
from llm_trainer.training.loss_spikes import lr_factor_after_rollbacks
from llm_trainer.training.memory.batch_size_finder import (
    BatchSizeFinder,
    empty_cache,
    smaller_micro_batch,
    take_memory_note,
    write_memory_note,
)
from llm_trainer.training.memory.memory_monitor import MemoryMonitor
from llm_trainer.training.objectives.objective import Objective
from llm_trainer.training.optim.lr_schedule import LRScheduleState
from llm_trainer.training.resolve_run import ResolvedRun
from llm_trainer.training.run_lock import RunLock
from llm_trainer.training.state import TrainingState

# What operations may change of a shape.
_GROWABLE = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size", "mlp_hidden_sizes", "kv_heads_per_layer", "lora", "active_adapters",
    "attn_lora_rank", "mlp_lora_rank", "embedding_lora_rank", "head_lora_rank",
)  # fmt: skip


class RunHooks(Protocol):
    """What a run calls of a callback; the rest of its hooks are the trainer's (callbacks/callback.py)."""

    def on_validation(self, run: TrainingRun, result: ValidationResult) -> None:
        """After a validation."""

    def on_checkpoint(self, run: TrainingRun, path: Path) -> None:
        """After a checkpoint was written and verified."""

    def between_steps(self, run: TrainingRun, step: int, validation: ValidationResult | None) -> None:
        """After everything of a step but its checkpoint."""

    def state_dict(self) -> dict[str, JSON]:
        """What the callback must know after a resume."""

    def load_state_dict(self, state: Mapping[str, JSON]) -> None:
        """Restore what `state_dict` returned."""


class TrainingRun:
    """One run: its model, data order, state, checkpoints and metrics.

    Args:
        resolved: Everything that was settled before.
        model: The model to train. It may be sharded from here on.
        train_dataset: The training split.
        eval_dataset: The validation split, if there is one.
        tokenizer: Saved with every checkpoint.
        objective: What is minimised (default: next-token cross-entropy).
        callbacks: Called in this order. The sequence is kept, not copied.
        store: Where checkpoints go (default: as the settings say).
        console: Where lines for the user go.

    Attributes:
        resolved: As given; never changed.
        engine: Runs steps and validations.
        state: The position of the run; stored in every checkpoint.
        batches: The present division of a rank's part of a step.
        length: The present length of the run.
        store: The checkpoints of the run folder.
        callbacks: The callbacks.
        meter: Measures throughput.
        monitor: Watches memory.
        outcomes: Outcomes of the latest steps.
        last_validation: The latest validation of this start.

    Raises:
        UsageError: For settings that do not fit together.
    """

    def __init__(
        self,
        resolved: ResolvedRun,
        model: Transformer,
        train_dataset: TokenDataset,
        eval_dataset: TokenDataset | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        objective: Objective | None = None,
        callbacks: Sequence[RunHooks] = (),
        store: CheckpointStore | None = None,
        console: Console | None = None,
    ) -> None:
        self.resolved, self.config, self.training = resolved, resolved.config, resolved.training
        self.process_group, self.device = resolved.process_group, resolved.device
        self.context, self.sampler, self.run_dir = resolved.context, resolved.sampler, resolved.run_dir
        self.train_dataset, self.eval_dataset, self.tokenizer = train_dataset, eval_dataset, tokenizer
        is_main = self.process_group.is_main
        self.console = (console or Console(stderr=True)) if is_main else Console(quiet=True)
        self.store = store or build_store(self.training, is_main=is_main)
        self.batches, self.length = resolved.batches, resolved.length
        self.engine = build_engine(
            model,
            self.training,
            objective,
            self.process_group,
            self.device,
            batches=resolved.batches,
            deepspeed=resolved.deepspeed,
        )
        self.callbacks = callbacks
        self.state = TrainingState(schedule=resolved.schedule, total_steps=resolved.length.steps)
        self.policy = CheckpointPolicy(self.training)
        self.monitor = MemoryMonitor(self.training, self.device, self.log)
        self.outcomes = Outcomes(self.training, self.log)
        self.last_validation: ValidationResult | None = None
        self.meter: ThroughputMeter
        self.metrics_tracker: MetricsTracker
        self._micro_batches: Prefetcher[Batch] | None = None
        self._mixture_stats = MixtureStats(self.state.source_tokens)
        self._progress: ProgressReporter | None = None
        self._lock: RunLock | None = None
        self._stop_requested = False
        self._started: float | None = None
        self._seconds_before = 0.0
        self._scaler: dict[str, float | int] = {}

    # What the run is.

    @property
    def model(self) -> Transformer:
        """The model in training; sharded over the ranks where the plan says so."""
        return self.engine.model

    @property
    def current_step(self) -> int:
        """Optimizer updates so far."""
        return self.state.step

    @property
    def sequences_per_step(self) -> int:
        """Sequences in one optimizer update, over all ranks."""
        return self.batches.sequences_per_step(self.process_group.data_world_size)

    @property
    def seconds(self) -> float:
        """Training time so far, over all starts of the run."""
        return self._seconds_before + self.seconds_since_start

    @property
    def seconds_since_start(self) -> float:
        """Training time since this start."""
        return 0.0 if self._started is None else time.monotonic() - self._started

    @property
    def stop_requested(self) -> bool:
        """Whether the run ends after this step."""
        return self._stop_requested

    @property
    def eval_interval(self) -> int:
        """Steps between validations."""
        return self.state.overrides.eval_interval or self.length.in_steps(self.training.eval_interval)

    @property
    def eval_iters(self) -> int | None:
        """Batches per validation; None means all."""
        return self.state.overrides.eval_iters or self.training.eval_iters

    @property
    def lr_factor(self) -> float:
        """The factor on the peak learning rates for the next update."""
        assert self.state.schedule is not None
        scheduled = self.state.schedule.factor(self.state.step, self.state.operations)
        return scheduled * lr_factor_after_rollbacks(self.state.spikes, self.training)

    def log(self, line: str) -> None:
        """Print one line for the user, and write it to the log file."""
        if self._progress is not None:
            self._progress.print_line(line)
        else:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """End the run after this step."""
        self._stop_requested = True

    # Opening and closing.

    def lock_run_dir(self) -> None:
        """Lock the run folder until `close`, so that no other process writes to it.

        Raises:
            CheckpointError: If another process trains there.
        """
        self._lock = self.process_group.run_on_main(lambda: RunLock(self.run_dir))
        if self._lock is not None and self._lock.problem is not None:
            self.log(
                f"{self.run_dir} cannot be locked ({self._lock.problem}): make sure that no other process "
                "trains there"
            )

    def open_run_dir(self) -> None:
        """Move aside what another run left in the run folder, write run.json, start the progress display."""
        self.process_group.barrier()  # all ranks have read what they resume from
        if not self.training.eval_only:
            self._begin_in_run_dir(self.state.step if self.resolved.resumes_in_place else None)
        log_dir = self.run_dir if self.training.file_logging and self.process_group.is_main else None
        self._progress = ProgressReporter(
            self.length.steps, first_step=self.state.step, console=self.console, log_folder=log_dir
        )

    def start(self, cache_dir: Path | None = None) -> None:
        """Make ready for the first step: micro-batch size, precision, compilation, engine, data, metrics.

        Args:
            cache_dir: Folder that keeps what compilations cost and gained, for `autotune`.
        """
        self.model.train()
        self._settle_batch_size()
        choice = self._tune(cache_dir)
        if choice.reason is not None:
            self.log(str(choice))
        self.state.precision, self.state.compile = choice.precision, choice.compile
        self.engine.start(choice.precision, choice.compile, self._scaler)
        self._open_batches()
        self.meter = ThroughputMeter(
            self._flops_per_token(), self.device, self.engine.precision.computing_dtype
        )
        is_resumed = self.resolved.checkpoint is not None
        self.metrics_tracker = self._open_metrics(self.state.step if is_resumed else None)
        if self.resolved.checkpoint is not None:
            restore_rng_state(self.resolved.checkpoint, self.process_group)
        self._started = time.monotonic()

    def _tune(self, cache_dir: Path | None) -> TuneResult:
        """Precision and compilation for the steps that are left; the model is compiled accordingly."""
        state, batches = self.state, self.batches
        if self.training.eval_only:
            precision = cast("PrecisionName", state.precision or self.engine.precision.name)
            return TuneResult(precision, "off")
        work = WorkLeft(
            micro_batches=max(0, self.length.steps - state.step) * batches.gradient_accumulation_steps,
            tokens=batches.micro_batch_size * self.context,
            context=self.context,
        )
        return self.engine.tune(
            lambda: self.sampler.batch(state.samples, batches.micro_batch_size),
            work,
            precision=state.precision,
            compiled=state.compile,
            cache_dir=cache_dir,
        )

    def close(self) -> None:
        """Stop threads, close files and unlock the run folder, at the run's end or after an error."""
        try:
            if problem := self.store.close(self.process_group):
                self.log(problem)
            if self._micro_batches is not None:
                self._micro_batches.close()
            if hasattr(self, "metrics_tracker"):
                self.metrics_tracker.close()
            if self._progress is not None:
                self._progress.close()
                self._progress = None
        finally:
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    # Resuming.

    def resume(self, checkpoint: Path) -> None:
        """Restore run state from a checkpoint, and print what the user has changed since.

        Args:
            checkpoint: A verified checkpoint folder.

        Raises:
            UsageError: For a setting that may not change.
            CheckpointError: For other data, or a checkpoint that does not fit.
        """
        for line in self._restore(checkpoint, self.training.lr_on_resume):
            self.log(line)
        self._seconds_before = self.state.seconds

    def rollback(self, checkpoint: Path, *, skip_data: bool = False) -> None:
        """Return to a checkpoint of this run, as if it were resumed there with the settings of now.

        Operations since then are undone, and checkpoints since then are moved aside. What the user has set
        since then, such as a later end, stays.

        Args:
            checkpoint: A verified checkpoint folder of this run.
            skip_data: Continue with the samples that come next now, instead of repeating those since the
                checkpoint. This counts as a rollback after a loss spike.
        """
        now, lr_on_resume = self.state, self.training.lr_on_resume
        if lr_on_resume is None:  # what became of it at an earlier resume
            assert now.schedule is not None
            lr_on_resume = "extend" if now.schedule.decay_steps == now.total_steps else "keep"
        self._restore(checkpoint, lr_on_resume)
        self.state = replace(self.state, seconds=now.seconds, precision=now.precision, compile=now.compile)
        self.engine.precision.load_state_dict(self._scaler)
        restore_rng_state(checkpoint, self.process_group)
        self.outcomes = Outcomes(self.training, self.log)
        self.metrics_tracker.close()
        self._begin_in_run_dir(self.state.step)
        self.metrics_tracker = self._open_metrics(self.state.step)
        if skip_data:
            then = self.state
            skipped = then.spikes.skipped_samples + now.samples - then.samples
            then.spikes = replace(then.spikes, rollbacks=now.spikes.rollbacks + 1, skipped_samples=skipped)
            then.samples, then.tokens, then.source_tokens = now.samples, now.tokens, now.source_tokens
        self._open_batches()

    def _restore(self, checkpoint: Path, lr_on_resume: str | None) -> list[str]:
        """Take shape, weights, optimizers, state, batches and callbacks from a checkpoint; returns the lines
        to print. What the settings say is compared, whatever operations have changed since.
        """
        training = self.training.model_copy(update={"lr_on_resume": lr_on_resume})
        resumption = read_resumption(
            checkpoint,
            self.config.model_copy(update={"training": training}),
            self.train_dataset,
            self.sampler,
            new_schedule=self.resolved.schedule,
            length=self.resolved.length,
            sequences_per_step=self.resolved.sequences_per_step,
        )
        self._take_shape(checkpoint, resumption.state)
        self.engine.load(lambda model, optimizers: restore(checkpoint, model, optimizers, verified=True))
        self.state, self._scaler = resumption.state, resumption.scaler
        self.length = replace(self.length, steps=resumption.steps)
        self._take_batches()
        for callback in self.callbacks:
            if type(callback).__name__ in resumption.callbacks:
                callback.load_state_dict(resumption.callbacks[type(callback).__name__])
        return resumption.lines

    def _take_shape(self, checkpoint: Path, state: TrainingState) -> None:
        """Make the engine's model one that the checkpoint's weights and optimizer state fit, where operations
        had changed it.
        """
        engine, overrides = self.engine, state.overrides
        now, then = with_explicit_values(engine.model.config), with_explicit_values(read_config(checkpoint))
        grown = any(getattr(then, name) != getattr(now, name) for name in _GROWABLE)
        frozen = frozenset(engine.initially_frozen if overrides.frozen is None else overrides.frozen)
        has_state = engine.optimized_names().issuperset(overrides.frozen_with_state)
        if not grown and frozen == frozen_names(engine.model) and has_state:
            return
        updates = {name: getattr(then, name) for name in _GROWABLE} if grown else {}
        shape = engine.model.config.model_copy(update=updates)
        empty = ModelState.from_model(empty_model(shape))
        engine.rebuild(
            replace(empty, optimizer_state={name: {} for name in overrides.frozen_with_state}, frozen=frozen)
        )

    # Changes while the run trains.

    def forget_spike(self) -> None:
        """Continue after a loss spike that cannot be undone: the rule starts with an empty window."""
        self.state.spikes = self.state.spikes.with_empty_window()

    def restructure(self, change: Callable[[ModelState], ModelState]) -> None:
        """Train a changed model from here on.

        Args:
            change: Makes the new model and optimizer state from the present ones. What it raises is raised.
        """
        self.engine.rebuild(change(self.engine.model_state()))
        frozen = frozen_names(self.engine.model)
        with_state = sorted(frozen & self.engine.optimized_names())
        self.state.overrides = replace(
            self.state.overrides, frozen=sorted(frozen), frozen_with_state=with_state
        )
        self.forget_spike()
        self.meter.flops_per_token = self._flops_per_token()

    def set_batches(self, batches: BatchPlan) -> None:
        """Continue with other batches. A length in epochs or tokens keeps its samples, in other steps.

        Args:
            batches: Micro-batch size and accumulation per rank.

        Raises:
            UsageError: If the engine cannot run a step divided so.
        """
        state, before = self.state, self.sequences_per_step
        after = batches.sequences_per_step(self.process_group.data_world_size)
        state.overrides = replace(
            state.overrides, micro_batch_size=batches.micro_batch_size, sequences_per_step=after
        )
        if after != before and self.length.steps != self.training.max_steps:
            total = state.step + math.ceil((self.length.steps - state.step) * before / after)
            if self.training.lr_decay_steps is None and state.schedule is not None:
                state.schedule = replace(state.schedule, decay_steps=total)
            state.total_steps = total
            self.length = replace(self.length, steps=total)
        self._take_batches()
        self._open_batches()

    def set_lr(self, learning_rate: float, *, warmup_steps: int, restart: bool = False) -> None:
        """Continue with another peak learning rate.

        Args:
            learning_rate: The peak.
            warmup_steps: Steps of warm-up.
            restart: Start warm-up and decay again from here.
        """
        state, configured = self.state, self.training.learning_rate
        assert state.schedule is not None
        factor = learning_rate / configured if configured else state.operations.factor
        state.operations = LRScheduleState(factor, state.step if restart else state.operations.offset)
        state.schedule = replace(state.schedule, warmup_steps=warmup_steps)

    def set_evaluation(self, *, eval_interval: int, eval_iters: int | None) -> None:
        """Validate at another interval, or on another number of batches.

        Args:
            eval_interval: Steps between validations.
            eval_iters: Batches per validation; None means all.
        """
        overrides = self.state.overrides
        if eval_interval != self.eval_interval:
            overrides = replace(overrides, eval_interval=eval_interval)
        if eval_iters != self.eval_iters:
            overrides = replace(overrides, eval_iters=eval_iters)
        self.state.overrides = overrides

    def largest_micro_batch(self, *, fraction: float | None = None, most: int | None = None) -> BatchPlan:
        """The largest micro-batch that fits into memory. Changes nothing.

        Args:
            fraction: Fraction of the memory that may be used (default: `memory_target_fraction`).
            most: The largest that is allowed, in sequences.

        Returns:
            The division of the same step with that micro-batch.

        Raises:
            UsageError: If no micro-batch within the bounds divides the step, and in a pipeline.
            OutOfMemory: If not even the smallest fits.
        """
        bounds = self.resolved.micro_batch_bounds or MicroBatchBounds()
        largest = min((one for one in (most, bounds.maximum) if one is not None), default=None)
        limits = MicroBatchBounds(bounds.minimum, largest)
        return self._find_batches(limits, fraction or self.training.memory_target_fraction)

    def retry_with_smaller_batches(self, error: OutOfMemory) -> None:
        """After a step that ran out of memory and changed nothing: save an emergency checkpoint and divide
        the step into smaller micro-batches.

        Args:
            error: What the step raised.

        Raises:
            OutOfMemory: If the micro-batch is a single sequence already, or if the ranks could not agree.
                Then a run that is resumed, as torchrun's restarts do, takes the smaller one.
        """
        smaller = smaller_micro_batch(self.batches, error)
        if not error.is_agreed:
            write_memory_note(self.run_dir, smaller, self.training, self.process_group.rank)
            raise OutOfMemory(
                f"{error}; continue with --resume auto, which will use micro_batch_size "
                f"{smaller.micro_batch_size}",
                is_agreed=False,
            )
        empty_cache(self.device)
        if self.state.step:
            self.save(emergency=True)
        self.log(
            f"step {self.state.step + 1}: {error}; retrying with micro_batch_size {smaller.micro_batch_size} "
            f"× {smaller.gradient_accumulation_steps} micro-batches, which is the same step"
        )
        self._divide(smaller.micro_batch_size)
        self._open_batches()
        self.metrics_tracker.update({"micro_batch_size": smaller.micro_batch_size}, self.state.step)

    # Data.

    def next_batches(self) -> list[Batch]:
        """This rank's micro-batches of the next step."""
        assert self._micro_batches is not None, "start comes before the first step"
        return [next(self._micro_batches) for _ in range(self.batches.gradient_accumulation_steps)]

    def _open_batches(self) -> None:
        """Take the next micro-batches from `state.samples` on, in the present division."""
        if self._micro_batches is not None:
            self._micro_batches.close()
        first, size, group, sampler = (
            self.state.samples,
            self.batches.micro_batch_size,
            self.process_group,
            self.sampler,
        )

        def load(number: int) -> Batch:
            position = first + (number * group.data_world_size + group.data_rank) * size
            return shard_batch(sampler.batch(position, size), group)

        self._micro_batches = Prefetcher(load, 0, self.training.num_workers)
        self._mixture_stats = MixtureStats(self.state.source_tokens)
        self.engine.expect_other_memory()

    def _settle_batch_size(self) -> None:
        """Before the first step: find the micro-batch that fits where the settings ask for it, unless a
        resumed run or the note of an attempt that ran out of memory knows it.
        """
        if self.training.eval_only:
            return
        bounds, was = self.resolved.micro_batch_bounds, self.batches.micro_batch_size
        noted = self._take_memory_note()
        if noted is not None:
            self._divide(noted)
            self.log(
                f"Using micro_batch_size {noted}: the last run ran out of memory at {was}. Set "
                "micro_batch_size to override."
            )
        elif bounds is not None and self.state.overrides.micro_batch_size is None:
            chosen = self._find_batches(bounds, self.training.memory_target_fraction)
            self._divide(chosen.micro_batch_size)
            self.log(
                f"Using micro_batch_size {chosen.micro_batch_size}, the largest that fits; "
                f"{chosen.gradient_accumulation_steps} micro-batches per step"
            )
        self.engine.check_batches(self.batches)

    def _take_memory_note(self) -> int | None:
        """The micro-batch that an attempt which ran out of memory left for this one. It counts if this run
        continues that attempt, and if the user has not changed the batch settings since.
        """
        size, same_settings = take_memory_note(self.run_dir, self.training, self.process_group)
        is_retry = self.resolved.checkpoint is None and self.training.resume_from is not None
        if size is None or not (self.resolved.resumes_in_place or is_retry):
            return None
        if not same_settings:
            self.log(
                f"ignoring micro_batch_size {size} of the last run: the batch settings have changed since"
            )
            return None
        return size if size < self.batches.micro_batch_size else None

    def _find_batches(self, bounds: MicroBatchBounds, fraction: float) -> BatchPlan:
        finder = BatchSizeFinder(self.engine, self.sampler, self.monitor.machine, self.process_group)
        return finder.find(self.batches, bounds, fraction, self.state.samples)

    def _divide(self, micro_batch_size: int) -> None:
        """Divide the step into micro-batches of this size, in the state too, so that a resumed run does the
        same.
        """
        self.state.overrides = replace(
            self.state.overrides,
            micro_batch_size=micro_batch_size,
            sequences_per_step=self.sequences_per_step,
        )
        self._take_batches()

    def _take_batches(self) -> None:
        """Let `batches` be what the settings say, with the state's overrides on top.

        Raises UsageError if the ranks do not divide them, or the engine cannot run a step divided so.
        """
        overrides, ranks, before = (
            self.state.overrides,
            self.process_group.data_world_size,
            self.sequences_per_step,
        )
        if overrides.sequences_per_step is None or overrides.micro_batch_size is None:
            self.batches = self.resolved.batches
        else:
            self.batches = _divided(overrides.sequences_per_step, overrides.micro_batch_size, ranks)
        self.engine.check_batches(self.batches)
        if (after := self.sequences_per_step) != before:
            length = self.length
            self.length = replace(
                length,
                steps_per_epoch=length.steps_per_epoch * before / after,
                tokens_per_step=length.tokens_per_step * after // before,
            )

    # Validation and metrics.

    def evaluate(self) -> ValidationResult:
        """The loss over the validation split (or `eval_iters` batches of it) as the model is now.

        Raises:
            UsageError: If there is no validation split.
        """
        if self.eval_dataset is None:
            raise UsageError(
                "there is no validation split to evaluate on; prepare the data with val_ratio above 0"
            )
        return self.engine.validate(
            self.eval_dataset,
            self.training.eval_batch_size or self.batches.micro_batch_size,
            limit=self.eval_iters,
            packing=Packing.from_config(self.config.data),
            on_batch=self._show_validation,
        )

    def validate(self) -> ValidationResult:
        """Evaluate, log, call the callbacks, and save the model if it is the best so far."""
        start = time.perf_counter()
        self.outcomes.flush(self.state)
        with self.engine.timings.measure("evaluation"):
            result = self.last_validation = self.evaluate()
        self.metrics_tracker.update(result.metrics, self.state.step)
        self.state.last_validation_loss = result.loss
        figures = "  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
        self.log(f"step {self.state.step}  {figures}")
        best = self.state.best_validation_loss
        is_best = math.isfinite(result.loss) and (best is None or result.loss < best)
        if is_best:
            self.state.best_validation_loss = result.loss
        for callback in self.callbacks:
            callback.on_validation(self, result)
        if is_best and not self.training.eval_only:
            self.state.between_steps_pending = True
            self.store.save_best(self.snapshot())
            self.state.between_steps_pending = False
        self.meter.exclude(time.perf_counter() - start)
        return result

    def call_between_steps(self, validation: ValidationResult | None) -> None:
        """Let the callbacks do what they do between two steps, operations among it.

        Args:
            validation: This step's validation, if there was one.
        """
        for callback in self.callbacks:
            callback.between_steps(self, self.state.step, validation)

    def finish_pending_callbacks(self) -> None:
        """Call the between-step callbacks if the checkpoint that the run is at was saved before them."""
        if self.state.between_steps_pending:
            self.state.between_steps_pending = False
            last = self.state.last_validation_loss
            self.call_between_steps(None if last is None else ValidationResult.from_loss(last))

    def mixture_metrics(self) -> dict[str, float]:
        """Fractions of each corpus since the last call."""
        return self._mixture_stats.read()

    def show_step(self) -> None:
        """Move the progress display to the present step."""
        if self._progress is not None:
            self._progress.advance(self.state.step, self.length.steps)

    def show_metrics(self, metrics: Mapping[str, float]) -> None:
        """Print a line of metrics."""
        if self._progress is not None:
            self._progress.show_metrics(self.state.step, metrics)

    def _show_validation(self, batches: int) -> None:
        if self._progress is not None and batches % 10 == 0:
            self._progress.show_status(f"validating: {batches:,} batches")

    def _open_metrics(self, resumed_step: int | None) -> MetricsTracker:
        folder = self.run_dir if self.process_group.is_main else None
        return MetricsTracker(folder, self.training.report_to, resumed_step=resumed_step, config=self.config)

    def _flops_per_token(self) -> float:
        """FLOPs per token on one rank, for the model as it is now."""
        return estimate_flops(self.model.config, self.context) / self.process_group.world_size

    # Checkpoints.

    def snapshot(self) -> CheckpointData:
        """The run as it is now, to be saved."""
        self.outcomes.flush(self.state)
        self.state.seconds = self.seconds
        callbacks = {
            type(callback).__name__: saved for callback in self.callbacks if (saved := callback.state_dict())
        }
        state: dict[str, JSON] = {
            **self.state.to_json(),
            "scaler": self.engine.precision.state_dict(),
            "callbacks": callbacks,
            "data": data_identity(self.train_dataset, self.sampler),
        }
        model, optimizers = self.engine.saved_objects()
        return CheckpointData(
            model,
            optimizers,
            state,
            self.config,
            self.tokenizer,
            self.process_group,
            self.resolved.generation,
        )

    def save(self, *, emergency: bool = False, ephemeral: bool = False) -> None:
        """Save a checkpoint now.

        Args:
            emergency: It exists on return. Other saves may be written in the background.
            ephemeral: A later one replaces it.
        """
        start, store = time.perf_counter(), self.store
        save = store.save_emergency if emergency else store.save_ephemeral if ephemeral else store.save
        with self.engine.timings.measure("saving"):
            save(self.snapshot(), self.state.step)
        self.policy.note_save()
        self.meter.exclude(time.perf_counter() - start)

    def save_if_due(self, *, wanted: bool) -> None:
        """Save the checkpoint that this step calls for.

        Args:
            wanted: Save a lasting checkpoint whatever the intervals say.
        """
        due = self.policy.due(self.state.step, self.length, self.process_group)
        if wanted or due == "lasting":
            self.save()
        elif due == "ephemeral":
            self.save(ephemeral=True)

    @property
    def save_progress(self) -> Progress:
        """The state of saves on this rank. The ranks agree on the largest before `report_saves`."""
        return self.store.progress

    def report_saves(self) -> None:
        """Wait for saves in the background, and call the callbacks for each checkpoint.

        Raises:
            CheckpointError: For a save that failed.
        """
        for path in self.store.wait():
            if path.name not in (BEST_MODEL, FINAL_MODEL):
                self.log(f"saved {path}")
                for callback in self.callbacks:
                    callback.on_checkpoint(self, path)
        for line in self.store.remote.take_messages() if self.store.remote is not None else []:
            self.log(line)

    def finish_saves(self) -> None:
        """At the run's end: report saves, and wait until the remote copy is complete.

        Raises:
            CheckpointError: If it cannot be completed.
        """
        self.report_saves()
        self.process_group.run_on_main(self.store.finish_uploads)

    def _begin_in_run_dir(self, resumed_step: int | None) -> None:
        """On the main rank, move aside what this run does not continue, and write run.json.

        Args:
            resumed_step: The step that the run resumes from; None for a new run.
        """

        def begin() -> Path | None:
            moved = self.store.begin(resumed_step)
            write_run_file(self.run_dir, self.config)
            return moved

        moved = self.process_group.broadcast_text(str(self.process_group.run_on_main(begin) or ""))
        if moved:
            self.log(f"moved checkpoints and records of another run from {self.run_dir} to {moved}")
        self._settle_best_model(moved, is_new=resumed_step is None)

    def _settle_best_model(self, moved: str, *, is_new: bool) -> None:
        """The lowest loss so far counts only if its model is in the run folder. Where the run resumes from
        another folder's checkpoint, that folder's best model is copied.

        Args:
            moved: Where an earlier run's files were moved to; empty if there were none.
            is_new: Whether the run starts in this folder.
        """
        state, group = self.state, self.process_group
        if is_new and state.best_validation_loss is not None:
            if not group.broadcast_text(group.run_on_main(self._copy_best_model) or ""):
                state.best_validation_loss = None
        elif moved and (Path(moved) / BEST_MODEL).exists():
            state.best_validation_loss = None

    def _copy_best_model(self) -> str:
        """The best model's new folder; empty where the checkpoint's run has none that counts."""
        checkpoint = self.resolved.checkpoint
        best = None if checkpoint is None else best_model_of(checkpoint, contents=False)
        if best is None:
            return ""
        target = self.run_dir / BEST_MODEL
        self.log(f"copying {best}, the best model so far, to {target}")
        if problems := copy_checkpoint(best, target):  # the copy is verified, so its files are read once
            self.log(f"skipping {best}: {'; '.join(problems[:3])}")
            return ""
        if self.store.remote is not None:
            self.store.remote.queue_upload(BEST_MODEL)
        return str(target)


def _divided(sequences: int, micro_batch_size: int, ranks: int) -> BatchPlan:
    """A step of so many sequences over all ranks, in the largest micro-batches up to `micro_batch_size`."""
    if sequences % ranks:
        raise UsageError(
            f"an operation has set {sequences} sequences per step, which {ranks} ranks do not divide; start "
            "another number of ranks"
        )
    per_rank = sequences // ranks
    largest = next(size for size in range(min(micro_batch_size, per_rank), 0, -1) if per_rank % size == 0)
    return BatchPlan(largest, per_rank // largest)
