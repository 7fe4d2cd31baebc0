"""The model in training: sharded over the ranks, compiled, wrapped, with its optimizers.

The trainer knows what a run is (data, order, state, checkpoints) and asks the engine for a step or a
validation. How a step runs is the engine's business: whole replicas and shards here, the stages of a pipeline
in `pipeline.py`, DeepSpeed in `deepspeed.py`. `build_engine.py` chooses among them.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from llm_trainer.config import TrainingConfig, UsageError
from llm_trainer.config.resolve.batch_size import BatchPlan
from llm_trainer.config.resolve.parallelism import check_precision, check_rounds, check_shape
from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.data.sampling.batch import Batch
from llm_trainer.data.sampling.packing import Packing
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.distributed.parallelize import (
    all_reduce_partial_gradients,
    apply_ddp,
    apply_parallelism,
    is_sharded,
)
from llm_trainer.distributed.process_group import ProcessGroup
from llm_trainer.model.surgery.model_state import ModelState
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.engines.autotune import Probe, TuneResult, WorkLeft, apply_choice, choose, measure
from llm_trainer.training.engines.compile import CompileMode, compile_model, uncompiled, undo_compile
from llm_trainer.training.engines.model_state_io import extract_state, load_state
from llm_trainer.training.engines.out_of_memory import OutOfMemory, is_out_of_memory
from llm_trainer.training.engines.precision import Precision, PrecisionName
from llm_trainer.training.engines.train_step import GradientSync, forward_backward, sync_gradients, update
from llm_trainer.training.engines.validation import ValidationResult, validate
from llm_trainer.training.logging.timers import StepTimers
from llm_trainer.training.objectives.objective import ModelWithObjective, NextToken, Objective
from llm_trainer.training.optim.optimizers import build_optimizers, peak_lrs, set_lrs
from llm_trainer.training.optim.param_groups import prepare_trainable

# Steps in which memory use may still rise: the second has the optimizers' state.
_UNPROVEN_STEPS = 2
Result = TypeVar("Result")


class StepResult(NamedTuple):
    """What a step computed; tensors on the device.

    Attributes:
        loss: Mean loss over the step's supervised tokens, in nats.
        gradient_norm: Norm of the gradient before clipping.
        skipped: 1 where nothing was changed, else 0.
    """

    loss: Tensor
    gradient_norm: Tensor
    skipped: Tensor


class Engine:
    """Trains a model by replicas and shards. It can validate at once; `start` makes it ready for steps.

    Args:
        model: The model. It may be sharded from here on.
        training: The settings.
        objective: What is minimised (default: next-token cross-entropy).
        process_group: The ranks, with their plan.
        device: Where this rank computes.

    Attributes:
        model: The model in training.
        optimizers: The optimizers of what this rank holds.
        initially_frozen: Names of the parameters that are not trained at first.
        precision: The precision of passes.
        timings: Where the time of a step goes.

    Raises:
        UsageError: If nothing can be trained, or the plan does not fit the model.
    """

    def __init__(
        self,
        model: Transformer,
        training: TrainingConfig,
        objective: Objective | None,
        process_group: ProcessGroup,
        device: torch.device,
    ) -> None:
        self.training, self.process_group, self.device = training, process_group, device
        prepare_trainable(model, training)
        self.timings = StepTimers(device)
        self._set_model(model, objective or NextToken(training.loss))
        self.compile_mode: CompileMode = "off"
        self._unproven_steps = _UNPROVEN_STEPS
        self._is_started = False
        self.initially_frozen = frozen_names(model)
        # Until `start`; enough to validate.
        self.precision = Precision("fp32" if training.precision == "auto" else training.precision, device)

    def _set_model(
        self, model: Transformer, objective: Objective, frozen_with_state: Iterable[str] = ()
    ) -> None:
        """Make `model` the one in training: sharded, with optimizers, which also hold the state of the
        parameters `frozen_with_state`.
        """
        self.model = model.to(self.device)
        self._full_step = ModelWithObjective(self.model, objective)
        self._shared = apply_parallelism(self.model, self._full_step, self.process_group)
        self._parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        names = set(frozen_with_state)
        frozen = [parameter for name, parameter in self.model.named_parameters() if name in names]
        for parameter in frozen:
            parameter.requires_grad_(True)
        self.optimizers = build_optimizers(self.model, self.training)
        for parameter in frozen:  # an optimizer skips a parameter without a gradient
            parameter.requires_grad_(False)
        self._peaks = peak_lrs(self.optimizers)
        # None: there is no dropout, so the generator need not be seeded at every micro-batch.
        self.dropout_seed = self.training.seed if has_dropout(self.model) else None
        self._step_module: torch.nn.Module = self._full_step

    # What is possible.

    def check_change(self, shape: ModelConfig) -> None:
        """Check, before training, that an operation can give the model this shape.

        Raises:
            UsageError: If it cannot.
        """
        if self.training.quantize_base != "off":
            raise UsageError(
                "quantize_base cannot be combined with operations that change the model; remove one of them"
            )
        check_shape(self.process_group.plan, shape)

    def check_batches(self, plan: BatchPlan) -> None:
        """Check that the ranks can run a step divided so.

        Raises:
            UsageError: If they cannot.
        """
        check_rounds(
            self.process_group.plan.pipeline_parallel,
            self.training.pipeline_schedule,
            plan.gradient_accumulation_steps,
        )

    def check_search(self) -> None:
        """Check that a micro-batch that fits can be searched for. It can, with this engine.

        Raises:
            UsageError: If it cannot.
        """

    # The model as others see it.

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        return self._full_step.objective

    @objective.setter
    def objective(self, objective: Objective) -> None:
        self._full_step.objective = objective

    def optimized_names(self) -> frozenset[str]:
        """Names of the parameters that the optimizers hold, frozen ones with state among them."""
        held = {
            id(one)
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for one in group["params"]
        }
        return frozenset(name for name, parameter in self.model.named_parameters() if id(parameter) in held)

    def model_state(self) -> ModelState:
        """The model and its optimizers' state without wrappers, as full tensors. A collective call."""
        return extract_state(self.model, self.optimizers)

    def rebuild(self, state: ModelState) -> None:
        """Train another model from here on: built, sharded, compiled and wrapped as the present one, which is
        released. A collective call.

        Args:
            state: The model and its optimizer state. Its weights are used, not copied.

        Raises:
            UsageError: If every parameter is frozen.
        """
        if not set(state.weights) - state.frozen:
            raise UsageError("nothing to train: every parameter is frozen")
        objective, self._step_module = self.objective, torch.nn.Identity()
        if self.compile_mode != "off":
            undo_compile(self.model)
            torch.compiler.reset()  # compiled code keeps the modules alive that it was made for
        del self.model, self._full_step, self.optimizers, self._parameters, self._shared
        gc.collect()  # modules and their wrappers refer to each other
        self._set_model(state.to_model(), objective, state.frozen & set(state.optimizer_state))
        load_state(self.model, self.optimizers, state.optimizer_state)
        self.model.train()
        compile_model(self.model, self.compile_mode)
        if self._is_started:
            self._step_module = apply_ddp(self._full_step, self.process_group)

    def saved_objects(self) -> tuple[Transformer, Sequence[torch.optim.Optimizer]]:
        """The model and its optimizers, full or sharded, of which a checkpoint is made. A collective call."""
        return self.model, self.optimizers

    def load(self, load: Callable[[Transformer, Sequence[torch.optim.Optimizer]], Result]) -> Result:
        """Load a checkpoint into the model and its optimizers. A collective call.

        Args:
            load: Loads weights and optimizer state into what it is given.

        Returns:
            What `load` returned.
        """
        return load(self.model, self.optimizers)

    # Before the first step.

    def tune(
        self,
        batch: Callable[[], Batch],
        work: WorkLeft,
        *,
        precision: str | None = None,
        compiled: str | None = None,
        cache_dir: Path | None = None,
    ) -> TuneResult:
        """Choose precision and compilation for the rest of the run, and compile the model. A collective call.

        Weights and gradients stay as they are.

        Args:
            batch: Makes the next micro-batch.
            work: What is left of the run.
            precision: The precision that a checkpoint stores, which takes effect.
            compiled: The compile mode that a checkpoint stores, likewise.
            cache_dir: Folder that keeps what compilations cost and gained, for `autotune`.

        Returns:
            The choice, alike on all ranks.
        """
        if is_sharded(self.model):  # it cannot be run on one rank, so nothing is tried
            return self._tune_untried(work, precision, compiled)

        def decide() -> TuneResult:
            def probe() -> Probe:
                return Probe(self.model, self._full_step, batch(), self.device, work.micro_batches)

            if self.training.autotune:
                return measure(
                    probe(), self.training, precision=precision, compiled=compiled, cache_dir=cache_dir
                )
            choice = choose(
                self.model, self.training, self.device, work, precision=precision, compiled=compiled
            )
            return choice if choice.compile == "off" else apply_choice(probe(), choice, self.training.compile)

        if self.process_group.world_size == 1:
            return decide()
        decided = self.process_group.run_on_main(decide)
        text = self.process_group.broadcast_text(json.dumps(asdict(decided) if decided else {}))
        choice = TuneResult(**json.loads(text))
        if not self.process_group.is_main:
            compile_model(self.model, choice.compile)
        return choice

    def _tune_untried(self, work: WorkLeft, precision: str | None, compiled: str | None) -> TuneResult:
        """The choice for a model that no rank can run alone: compiled by block, and only if asked to."""
        mode = compiled or ("blocks" if self.training.compile == "on" else "off")
        choice = choose(self.model, self.training, self.device, work, precision=precision, compiled=mode)
        compile_model(self.model, choice.compile)
        return choice

    def start(
        self,
        precision: PrecisionName,
        compile_mode: CompileMode,
        scaler: dict[str, float | int] | None = None,
    ) -> None:
        """Make ready for steps.

        Args:
            precision: Precision of passes.
            compile_mode: How `tune` compiled the model.
            scaler: Stored state of the fp16 gradient scaler.

        Raises:
            UsageError: For a precision in which the ranks of this plan cannot train.
        """
        check_precision(self.process_group.plan, precision)
        self._is_started = True
        self.expect_other_memory()
        self._wrap()
        self.precision = Precision(precision, self.device)
        self.precision.load_state_dict(scaler or {})
        self.compile_mode = compile_mode

    def _wrap(self) -> None:
        self._step_module = apply_ddp(self._full_step, self.process_group)

    # Steps and validation.

    def step(self, batches: Sequence[Batch], tokens: int, *, lr_factor: float, index: int) -> StepResult:
        """One update. Nothing here waits for the device. A collective call.

        Args:
            batches: This rank's micro-batches.
            tokens: Supervised tokens of the step, over all ranks.
            lr_factor: Factor on the peak learning rates.
            index: Updates before this one, which dropout depends on.

        Returns:
            Loss, gradient norm and whether the step was skipped.

        Raises:
            OutOfMemory: If a rank ran out of memory. Nothing has changed then.
        """
        set_lrs(self.optimizers, self._peaks, lr_factor)
        loss = self._forward_backward(batches, tokens, index)
        all_reduce_partial_gradients(self._shared)
        with self.timings.measure("optimizer"):
            norm, skipped = update(
                self.optimizers,
                self._parameters,
                loss,
                tokens,
                self.precision,
                self.training.max_grad_norm,
                offload=self.training.offload_optimizer,
            )
        self.timings.step_done()
        return StepResult(loss, norm, skipped)

    def expect_other_memory(self) -> None:
        """The next steps need more or less memory than those before: make sure that ranks can agree if they
        run out of it.
        """
        self._unproven_steps = _UNPROVEN_STEPS

    def trial(self, batch: Batch) -> None:
        """A forward and backward pass of this rank alone, whose gradients are thrown away.

        Raises:
            OutOfMemory: If memory runs out.
        """
        try:
            with self.precision.autocast():
                total = self._full_step(batch.to(self.device)).total
            total.backward()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            message = f"out of memory with {len(batch)} sequences"
            raise OutOfMemory(message) from None  # a traceback would keep tensors alive
        finally:
            self.model.zero_grad(set_to_none=True)

    def _forward_backward(self, batches: Sequence[Batch], tokens: int, index: int) -> Tensor:
        """Gradients and mean loss of a step. Raises OutOfMemory, on all ranks alike where that is possible.

        Whole replicas communicate only in the last micro-batch's backward pass. A rank that runs out of
        memory before that takes part in it with a pass of one token, and then all ranks learn of it. In the
        first steps, which need what later ones need, nothing is sent before every rank is through, so the
        ranks can agree wherever it happened. Shards communicate all the time: there the run ends.
        """
        group = self.process_group
        has_replicas = 1 < group.world_size == group.plan.data_parallel and not is_sharded(self.model)
        sync = GradientSync(is_delayed=has_replicas and self._unproven_steps > 0)
        self._unproven_steps = max(0, self._unproven_steps - 1)
        problem, loss = "", torch.zeros((), device=self.device)
        try:
            loss = forward_backward(
                self._step_module,
                batches,
                tokens,
                self.precision,
                seed=self.dropout_seed,
                index=index,
                process_group=group,
                timings=self.timings,
                sync=sync,
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # The error itself would keep tensors alive.
            problem = f"out of memory with {len(batches[0])} sequences at once"
        if problem and group.world_size > 1 and (sync.has_begun or not has_replicas):
            raise OutOfMemory(f"rank {group.rank}: {problem}", is_agreed=False)
        if problem:
            self.model.zero_grad(set_to_none=True)
        if has_replicas and (problem or sync.is_delayed):
            sync_gradients(self._step_module, batches[0], self.precision)
        if group.all_reduce_max([bool(problem)])[0]:
            self.model.zero_grad(set_to_none=True)
            raise OutOfMemory(
                problem or f"another rank ran out of memory with {len(batches[0])} sequences at once"
            )
        return group.all_reduce_tensor(loss)

    def _validation_step(self) -> torch.nn.Module:
        return self._full_step

    def validate(
        self,
        dataset: TokenDataset,
        batch_size: int,
        *,
        limit: int | None = None,
        packing: Packing | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> ValidationResult:
        """Loss over a held-out split with the model as it is now. A collective call.

        Args:
            dataset: The split.
            batch_size: Sequences per batch.
            limit: Batches to evaluate, spread over the split (default: all).
            packing: How rows are packed (default: greedily).
            on_batch: Called after each batch with the number of batches so far.
        """
        with uncompiled(self.compile_mode):
            return validate(
                self.model,
                dataset,
                self.model.config.max_position_embeddings,
                batch_size,
                device=self.device,
                autocast=self.precision.autocast,
                limit=limit,
                packing=packing,
                on_batch=on_batch,
                step=self._validation_step(),
                process_group=self.process_group,
            )


def frozen_names(model: Transformer) -> frozenset[str]:
    """Names of the parameters that are not trained."""
    return frozenset(name for name, parameter in model.named_parameters() if not parameter.requires_grad)


def has_dropout(model: Transformer) -> bool:
    """Whether training draws random numbers."""
    drops = any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))
    low_rank = any(table.dropout for table in model.config.lora.values())
    return bool(model.config.attention_dropout or model.config.dropout or drops or low_rank)
