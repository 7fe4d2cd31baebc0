"""The model in training: cut over the ranks, compiled, wrapped, with its optimizers; what a step runs and an
operation replaces.

The trainer knows what a run is (data, order, state, saving) and asks the engine to do a step or a validation.
How a step is run (by whole replicas, by shards, by stages of a pipeline) is the engine's affair;
`build_engine` is the one place where it is decided.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from llm_trainer.config import TrainingConfig, UsageError
from llm_trainer.config.resolve.batch_size import BatchPlan
from llm_trainer.config.resolve.parallelism import check_precision, check_rounds, check_shape
from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.data.sampling.packing import Packing
from llm_trainer.data.sampling.samplers import Batch
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.distributed.parallelize import is_sharded, replicate, shard, sum_shared
from llm_trainer.distributed.process_group import Ranks
from llm_trainer.model.surgery.model_state import Form, build
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.checkpoint.model_state_io import give_state, taken_apart
from llm_trainer.training.engines.autotune import Choice, Probe, choose
from llm_trainer.training.engines.compile import CompileMode, compile_model, uncompiled, undo_compile
from llm_trainer.training.engines.precision import Precision, PrecisionName
from llm_trainer.training.engines.train_step import Sending, forward_backward, send_gradients, update
from llm_trainer.training.engines.tuning import agreed_choice
from llm_trainer.training.engines.validation import ValidationResult, validate
from llm_trainer.training.logging.timers import Timings
from llm_trainer.training.memory.out_of_memory import OutOfMemory, is_out_of_memory
from llm_trainer.training.objectives.objective import NextToken, Objective, TrainingStep
from llm_trainer.training.optim.optimizers import build_optimizers, peak_rates, set_rates
from llm_trainer.training.optim.param_groups import prepare_trainable

_UNPROVEN_STEPS = 2  # the second has the optimizers' state beside it
Result = TypeVar("Result")


class StepResult(NamedTuple):
    """Tensors on the device: mean loss over the step's tokens in nats, the gradient's norm before clipping, 1
    where nothing was changed.
    """

    loss: Tensor
    gradient_norm: Tensor
    skipped: Tensor


class Engine:
    """Trains `model` by replicas and shards, as the plan of `ranks` says. Made whole, it can validate;
    `start` makes it ready for steps.

    `model` may be cut over the ranks from here on; `optimizers` hold what this rank holds. Raises UsageError where nothing can be trained.
    """

    def __init__(
        self,
        model: Transformer,
        training: TrainingConfig,
        objective: Objective | None,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self.training, self.ranks, self.device = training, ranks, device
        prepare_trainable(model, training)
        self.timings = Timings(device)
        self._take(model, objective or NextToken(training.loss))
        self.compile_mode: CompileMode = "off"
        self._unproven_steps = _UNPROVEN_STEPS
        self._is_started = False
        self.frozen_at_first = frozen_names(model)
        # Until precision is settled; enough to validate.
        self.precision = Precision("fp32" if training.precision == "auto" else training.precision, device)

    def _take(self, model: Transformer, objective: Objective, resting: Iterable[str] = ()) -> None:
        """Make `model` the one in training: cut, with optimizers. `resting` are frozen parameters whose state
        the optimizers hold.
        """
        self.model = model.to(self.device)
        self._whole_step = TrainingStep(self.model, objective)
        self._shared = shard(self._whole_step, self.ranks)
        self._parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        frozen = [parameter for name, parameter in self.model.named_parameters() if name in set(resting)]
        for parameter in frozen:
            parameter.requires_grad_(True)
        self.optimizers = build_optimizers(self.model, self.training)
        for parameter in frozen:  # without a gradient an optimizer passes over it
            parameter.requires_grad_(False)
        self._peaks = peak_rates(self.optimizers)
        self.dropout_seed = (
            self.training.seed if has_dropout(self.model) else None
        )  # None: no need to seed at every micro-batch
        self._step_module: torch.nn.Module = self._whole_step

    def check_change(self, shape: ModelConfig) -> None:
        """Raises UsageError where an operation cannot make the model one of this shape, so that a schedule is
        refused before training.
        """
        if self.training.quantize_base != "off":
            raise UsageError(
                "operations that change the model do not go with quantize_base, whose matrices are fixed; leave one out"
            )
        check_shape(self.ranks.plan, shape)

    def check_batches(self, plan: BatchPlan) -> None:
        """Raises UsageError where this plan's ranks cannot run a step divided so."""
        check_rounds(
            self.ranks.plan.pipeline_parallel,
            self.training.pipeline_schedule,
            plan.gradient_accumulation_steps,
        )

    def check_search(self) -> None:
        """Raises UsageError where a micro-batch that fits cannot be looked for: not here."""

    def form(self) -> Form:
        """The model and its optimizers' state apart from wrappers: whole tensors, gathered where they are
        cut. A collective call.
        """
        return taken_apart(self.model, self.optimizers)

    def rebuild(self, form: Form) -> None:
        """Train `form` from here on: built, cut, compiled and wrapped as the model before, which is let go
        of. A collective call.

        What `form` gives as weights is used, not copied. Raises UsageError where nothing in it can be
        trained.
        """
        if not set(form.weights) - form.frozen:
            raise UsageError("nothing to train: every parameter is frozen")
        objective, self._step_module = self.objective, torch.nn.Identity()
        if self.compile_mode != "off":
            undo_compile(self.model)
            torch.compiler.reset()  # compiled code holds on to the modules that it was made for
        del self.model, self._whole_step, self.optimizers, self._parameters, self._shared
        gc.collect()  # modules and their wrappers point at each other
        self._take(build(form), objective, resting=form.frozen & set(form.state))
        give_state(self.model, self.optimizers, form.state)
        self.model.train()
        compile_model(self.model, self.compile_mode)
        if self._is_started:
            self._step_module = replicate(self._whole_step, self.ranks)

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        return self._whole_step.objective

    @objective.setter
    def objective(self, objective: Objective) -> None:
        self._whole_step.objective = objective

    def tune(
        self,
        batch: Callable[[], Batch],
        micro_batches_left: int,
        *,
        precision: str | None = None,
        compiled: str | None = None,
        cache_dir: Path | None = None,
        say: Callable[[str], None] = print,
    ) -> Choice:
        """Precision and compilation for the steps that are left, alike on all ranks: as said, or as the main
        one's machine does it fastest.

        `batch` makes the next micro-batch; `precision` and `compiled` are what a checkpoint says, which holds; `cache_dir` keeps what was
        learned. The model is compiled then, or not, accordingly; weights and gradients are as before.
        """

        def measure() -> Choice:
            probe = Probe(self.model, self._whole_step, batch(), self.device, micro_batches_left)
            return choose(
                probe, self.training, precision=precision, compiled=compiled, memory=cache_dir, say=say
            )

        return agreed_choice(
            self.model,
            self.training,
            self.ranks,
            self.device,
            measure,
            precision=precision,
            compiled=compiled,
        )

    def start(
        self,
        precision: PrecisionName,
        compile_mode: CompileMode,
        scaler: dict[str, float | int] | None = None,
    ) -> None:
        """Make ready for steps in this precision; `compile_mode` is how the model was compiled, `scaler`
        fp16's stored state.

        Raises UsageError for a precision in which this plan's ranks cannot train.
        """
        check_precision(self.ranks.plan, precision)
        self._is_started = True
        self.expect_other_memory()
        self._make_ready()
        self.precision = Precision(precision, self.device)
        self.precision.load_state_dict(scaler or {})
        self.compile_mode = compile_mode

    def _make_ready(self) -> None:
        self._step_module = replicate(self._whole_step, self.ranks)

    def _step_of_validation(self) -> torch.nn.Module:
        return self._whole_step

    def step(self, batches: Sequence[Batch], tokens: int, *, rate_factor: float, index: int) -> StepResult:
        """One update from this rank's micro-batches; `tokens` are the supervised ones of all ranks, `index`
        the updates done before.

        Peak rates are multiplied by `rate_factor`. Nothing here waits for the device. A collective call.
        Raises OutOfMemory where a rank's memory did not do for it; nothing has changed then.
        """
        set_rates(self.optimizers, self._peaks, rate_factor)
        loss = self._within_memory(batches, tokens, index)
        sum_shared(self._shared)
        with self.timings.of("optimizer"):
            norm, skipped = update(
                self.optimizers, self._parameters, loss, tokens, self.precision, self.training.max_grad_norm,
                offload=self.training.offload_optimizer,
            )  # fmt: skip
        self.timings.step_done()
        return StepResult(loss, norm, skipped)

    def expect_other_memory(self) -> None:
        """The next steps need more or less memory than those before: see that ranks can agree where it does
        not do.
        """
        self._unproven_steps = _UNPROVEN_STEPS

    def trial(self, batch: Batch) -> None:
        """A forward and backward pass of this rank alone, whose gradients are thrown away. Raises
        OutOfMemory.
        """
        try:
            with self.precision.autocast():
                total = self._whole_step(batch.to(self.device)).total
            total.backward()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(
                f"out of memory with {len(batch)} sequences"
            ) from None  # a traceback would hold on to tensors
        finally:
            self.model.zero_grad(set_to_none=True)

    def _within_memory(self, batches: Sequence[Batch], tokens: int, index: int) -> Tensor:
        """Gradients and mean loss of a step. Raises OutOfMemory, on all ranks alike where that can be.

        Whole replicas speak to each other only in the last micro-batch's backward pass. A rank that has no
        memory before that takes part in it with a pass of one token, and then all hear of it. In the first
        steps, which need what later ones need, nothing is sent before every rank is through, so they can
        agree wherever it was. Shards speak to each other all the time: there the run ends.
        """
        has_replicas = 1 < self.ranks.count == self.ranks.plan.data_parallel and not is_sharded(self.model)
        sending = Sending(waits=has_replicas and self._unproven_steps > 0)
        self._unproven_steps = max(0, self._unproven_steps - 1)
        problem, loss = "", torch.zeros((), device=self.device)
        try:
            loss = forward_backward(
                self._step_module, batches, tokens, self.precision,
                seed=self.dropout_seed, index=index, ranks=self.ranks, timings=self.timings, sending=sending,
            )  # fmt: skip
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            problem = f"out of memory with {len(batches[0])} sequences at once"  # the error itself would hold on to tensors
        if problem and self.ranks.count > 1 and (sending.began or not has_replicas):
            raise OutOfMemory(f"rank {self.ranks.rank}: {problem}", is_agreed=False)
        if problem:
            self.model.zero_grad(set_to_none=True)
        if has_replicas and (problem or sending.waits):
            send_gradients(self._step_module, batches[0], self.precision)
        if self.ranks.largest([bool(problem)])[0]:
            self.model.zero_grad(set_to_none=True)
            raise OutOfMemory(
                problem or f"another rank was out of memory with {len(batches[0])} sequences at once"
            )
        return self.ranks.add_tensor(loss)

    def kept(self) -> tuple[Transformer, Sequence[torch.optim.Optimizer]]:
        """What a checkpoint is made from: the model and its optimizers, whole or cut over the ranks. A
        collective call.
        """
        return self.model, self.optimizers

    def load(self, load: Callable[[Transformer, Sequence[torch.optim.Optimizer]], Result]) -> Result:
        """Run `load` on the model and its optimizers, and train on with what it gave them. A collective call."""
        return load(self.model, self.optimizers)

    def validate(
        self,
        tokens: TokenDataset,
        batch_size: int,
        *,
        limit: int | None = None,
        packing: Packing | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> ValidationResult:
        """Loss over a held-out split with the model as it is now; arguments as for `validation.validate`. A
        collective call.
        """
        with uncompiled(self.compile_mode):
            return validate(
                self.model,
                tokens,
                self.model.config.max_position_embeddings,
                batch_size,
                device=self.device,
                autocast=self.precision.autocast,
                limit=limit,
                packing=packing,
                on_batch=on_batch,
                step=self._step_of_validation(),
                ranks=self.ranks,
            )


def build_engine(
    model: Transformer,
    training: TrainingConfig,
    objective: Objective | None,
    ranks: Ranks,
    device: torch.device,
) -> Engine:
    """The engine that the settings ask for."""
    if ranks.plan.pipeline_parallel > 1:
        from llm_trainer.training.engines.pipeline import PipelineEngine

        return PipelineEngine(model, training, objective, ranks, device)
    if training.use_deepspeed:
        from llm_trainer.training.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, training, objective, ranks, device)
    return Engine(model, training, objective, ranks, device)


def frozen_names(model: Transformer) -> frozenset[str]:
    """Parameters that are not trained."""
    return frozenset(name for name, parameter in model.named_parameters() if not parameter.requires_grad)


def has_dropout(model: Transformer) -> bool:
    """Whether training draws random numbers."""
    drops = any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))
    low_rank = any(table.dropout for table in model.config.lora.values())
    return bool(model.config.attention_dropout or model.config.dropout or drops or low_rank)
