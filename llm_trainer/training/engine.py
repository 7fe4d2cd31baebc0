"""The model in training: cut over the ranks, compiled, wrapped, with its optimizers; what a step runs and an operation replaces.

The trainer knows what a run is (data, order, state, saving) and asks the engine to do a step or a validation. How a step is run (by whole
replicas, by shards, by stages of a pipeline) is the engine's affair; `build_engine` is the one place where it is decided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llm_trainer.config import TrainingConfig
from llm_trainer.data.sampling.packing import Packing
from llm_trainer.data.sampling.samplers import Batch
from llm_trainer.data.shards import TokenDataset
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.autotune import Choice, Probe, choose
from llm_trainer.training.compilation import CompileMode, uncompiled
from llm_trainer.training.objectives import NextToken, Objective, TrainingStep
from llm_trainer.training.optimizers import build_optimizers, peak_rates, set_rates
from llm_trainer.training.parallel import replicate, shard
from llm_trainer.training.precision import Precision, PrecisionName
from llm_trainer.training.ranks import Ranks
from llm_trainer.training.step import forward_backward, update
from llm_trainer.training.tuning import agreed_choice
from llm_trainer.training.validation import ValidationResult, validate


class StepResult(NamedTuple):
    """Tensors on the device: mean loss over the step's tokens in nats, the gradient's norm before clipping, 1 where nothing was changed."""

    loss: Tensor
    gradient_norm: Tensor
    skipped: Tensor


class Engine:
    """Trains `model` by replicas and shards, as the plan of `ranks` says. Made whole, it can validate; `start` makes it ready for steps.

    `model` may be cut over the ranks from here on; `optimizers` hold what this rank holds. Raises UsageError where nothing can be trained.
    """

    def __init__(
        self, model: Transformer, training: TrainingConfig, objective: Objective | None, ranks: Ranks, device: torch.device
    ) -> None:
        self.training, self.ranks, self.device = training, ranks, device
        self.model = model.to(device)
        self._whole_step = TrainingStep(self.model, objective or NextToken(training.loss))
        shard(self._whole_step, ranks)
        self.optimizers = build_optimizers(self.model, training)
        self._peaks = peak_rates(self.optimizers)
        self._parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.dropout_seed = training.seed if _has_dropout(self.model) else None  # None: no need to seed at every micro-batch
        self._step_module: torch.nn.Module = self._whole_step
        self.compile_mode: CompileMode = "off"
        # Until precision is settled; enough to validate.
        self.precision = Precision("fp32" if training.precision == "auto" else training.precision, device)

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
        """Precision and compilation for the steps that are left, alike on all ranks: as said, or as the main one's machine does it fastest.

        `batch` makes the next micro-batch; `precision` and `compiled` are what a checkpoint says, which holds; `cache_dir` keeps what was
        learned. The model is compiled then, or not, accordingly; weights and gradients are as before.
        """

        def measure() -> Choice:
            probe = Probe(self.model, self._whole_step, batch(), self.device, micro_batches_left)
            return choose(probe, self.training, precision=precision, compiled=compiled, memory=cache_dir, say=say)

        return agreed_choice(self.model, self.training, self.ranks, self.device, measure, precision=precision, compiled=compiled)

    def start(self, precision: PrecisionName, compile_mode: CompileMode, scaler: dict[str, float | int] | None = None) -> None:
        """Make ready for steps in this precision; `compile_mode` is how the model was compiled, `scaler` fp16's stored state."""
        self._step_module = replicate(self._whole_step, self.ranks)
        self.precision = Precision(precision, self.device)
        self.precision.load_state_dict(scaler or {})
        self.compile_mode = compile_mode

    def step(self, batches: Sequence[Batch], tokens: int, *, rate_factor: float, index: int) -> StepResult:
        """One update from this rank's micro-batches; `tokens` are the supervised ones of all ranks, `index` the updates done before.

        Peak rates are multiplied by `rate_factor`. Nothing here waits for the device. A collective call.
        """
        set_rates(self.optimizers, self._peaks, rate_factor)
        loss = forward_backward(self._step_module, batches, tokens, self.precision, seed=self.dropout_seed, index=index, ranks=self.ranks)
        norm, skipped = update(self.optimizers, self._parameters, loss, tokens, self.precision, self.training.max_grad_norm)
        return StepResult(loss, norm, skipped)

    def validate(
        self,
        tokens: TokenDataset,
        batch_size: int,
        *,
        limit: int | None = None,
        packing: Packing | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> ValidationResult:
        """Loss over a held-out split with the model as it is now; arguments as for `validation.validate`. A collective call."""
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
                step=self._whole_step,
                ranks=self.ranks,
            )


def build_engine(model: Transformer, training: TrainingConfig, objective: Objective | None, ranks: Ranks, device: torch.device) -> Engine:
    """The engine that the plan asks for."""
    return Engine(model, training, objective, ranks, device)


def _has_dropout(model: Transformer) -> bool:
    drops = any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))
    return bool(model.config.attention_dropout or model.config.dropout or drops)
