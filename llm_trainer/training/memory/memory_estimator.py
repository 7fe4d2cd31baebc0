"""Estimates the memory of a training step by running the step on tensors without contents.

The run's own model, loss and optimizers go through two steps in torch's FakeTensorMode, where a tensor has a
shape, a dtype and a lifetime, but no memory. A tracker records what is alive after each operation. So the
estimate follows the code (a chunked loss, activation checkpointing, what autocast keeps) without a second
description of it that could drift. A closed formula was the alternative: faster still, and wrong after the
next change of a kernel. The memory that a kernel uses internally is not seen.

A deep model is not run at full depth. Blocks are alike, so two shallow models are run, and their difference
is extrapolated to the full depth. The memory of a pipeline's stage is estimated in the same way in
`pipeline_memory.py`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from llm_trainer.config import TrainingConfig
from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.data.sampling.batch import Batch
from llm_trainer.distributed.context_parallel import ContextParallelShard
from llm_trainer.model.adapters.nf4 import bytes_saved, check_quantizable
from llm_trainer.model.transformer import Transformer
from llm_trainer.torch_compat import TorchDispatchMode, fake_tensor_mode, item_op, tree_leaves
from llm_trainer.training.engines.precision import Precision, PrecisionName
from llm_trainer.training.engines.train_step import clip_gradients
from llm_trainer.training.objectives.objective import ModelWithObjective, NextToken
from llm_trainer.training.optim.optimizers import build_optimizers
from llm_trainer.training.optim.param_groups import freeze_parameters

_SHALLOW = 2  # the least difference in layers of the two shallow models


@dataclass(frozen=True)
class StepMemory:
    """Memory of one step on one rank that holds the full model, in bytes.

    Attributes:
        weights: Weights.
        optimizer: Optimizer state.
        loss_buffers: Buffers that the loss keeps between steps.
        moments: The peaks inside a step: bytes of gradients held, and of everything else in addition to
            `between_steps` (activations, temporaries).
        saved_by_quantization: How much more the weights would need as floats.
    """

    weights: int
    optimizer: int
    loss_buffers: int
    moments: tuple[tuple[int, int], ...]
    saved_by_quantization: int = 0

    @property
    def between_steps(self) -> int:
        """Bytes that are held all the time."""
        return self.weights + self.optimizer + self.loss_buffers

    def peak(self, gradient_fraction: float = 1.0) -> int:
        """The peak of a step above `between_steps`, in bytes.

        Args:
            gradient_fraction: The fraction of the gradients that the rank holds.
        """
        return max(
            (int(gradients * gradient_fraction) + others for gradients, others in self.moments), default=0
        )

    @property
    def activations(self) -> int:
        """The most that is held in addition to gradients, in bytes."""
        return max((others for _, others in self.moments), default=0)


def step_memory(
    shape: ModelConfig,
    training: TrainingConfig,
    *,
    sequences: int,
    micro_batches: int = 1,
    precision: PrecisionName | None = None,
) -> StepMemory:
    """Estimate the memory of a step at full context, uncompiled, with kernels as on a CPU.

    Where ranks divide sequences, the estimate is for the rank that gathers most.

    Args:
        shape: The model's shape.
        training: The settings.
        sequences: Sequences per micro-batch.
        micro_batches: Micro-batches per step. More than two need no more memory than two.
        precision: The precision that stands in for `auto` (default: bf16).

    Raises:
        UsageError: For a base model that cannot be quantized, where the settings ask for it.
    """
    name = assumed_precision(training, precision)
    run = (without_lr_multipliers(training), sequences, min(micro_batches, 2), name)
    unit = depth_unit(shape)
    if shape.num_hidden_layers <= 3 * unit or training.freeze_layers:  # frozen blocks are not like the others
        return _run_two_steps(shape, *run)
    low, high = (
        _run_two_steps(shape.model_copy(update={"num_hidden_layers": times * unit}), *run) for times in (2, 3)
    )
    return _extrapolate(low, high, (shape.num_hidden_layers - 3 * unit) / unit)


def assumed_precision(training: TrainingConfig, precision: PrecisionName | None) -> PrecisionName:
    """The precision to estimate with: `precision` if it is given, bf16 for `auto`.

    Args:
        training: The setting `precision`.
        precision: Overrides it.
    """
    return precision or ("bf16" if training.precision == "auto" else training.precision)


def without_lr_multipliers(training: TrainingConfig) -> TrainingConfig:
    """The settings without learning-rate multipliers per part: they need no memory, and name parts that a
    shallow model does not have.

    Args:
        training: The settings. They are not changed.
    """
    return training.model_copy(update={"lr_multipliers": {}, "layerwise_lr_decay": 1.0})


def depth_unit(shape: ModelConfig) -> int:
    """The layers by which one shallow model is deeper than the other: full periods of activation
    checkpointing.

    Args:
        shape: The model's shape.
    """
    every = max(1, shape.activation_checkpoint_every) if shape.gradient_checkpointing else 1
    return every * -(-_SHALLOW // every)


def _extrapolate(low: StepMemory, high: StepMemory, times: float) -> StepMemory:
    """`high` plus `times` the difference of the two. Of the moments only the peaks are kept: with all
    gradients, and with none.
    """

    def extrapolate(first: int, second: int) -> int:
        return second + round((second - first) * times)

    moments = []
    for fraction in (1.0, 0.0):
        first, second = (
            max(one.moments, key=lambda moment: fraction * moment[0] + moment[1]) for one in (low, high)
        )
        moments.append((extrapolate(first[0], second[0]), extrapolate(first[1], second[1])))
    return StepMemory(
        extrapolate(low.weights, high.weights),
        extrapolate(low.optimizer, high.optimizer),
        extrapolate(low.loss_buffers, high.loss_buffers),
        tuple(moments),
        extrapolate(low.saved_by_quantization, high.saved_by_quantization),
    )


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of live tensors, gradients separately, and the peaks.

    Attributes:
        gradients: Bytes of gradients now.
        others: Bytes of other tensors now.
        moments: The most bytes of other tensors, by bytes of gradients.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gradients, self.others = 0, 0
        self.moments: dict[int, int] = {}
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, list[str]] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is item_op():
            return 1  # the code reads numbers only to check that values are valid
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._record(leaf)
        return result

    def _record(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta":  # another stage of a pipeline holds it
            return
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        kind, size = ["others"], storage.nbytes()
        self._known[storage] = kind
        weakref.finalize(storage, self._free, kind, size)
        self.others += size
        self.moments[self.gradients] = max(self.moments.get(self.gradients, 0), self.others)

    def _free(self, kind: list[str], size: int) -> None:
        if kind[0] == "gradients":
            self.gradients -= size
        else:
            self.others -= size

    def mark_gradient(self, parameter: Tensor) -> None:
        """Count a parameter's gradient, which has just been computed, as one.

        Args:
            parameter: The parameter.
        """
        if parameter.grad is None:
            return
        storage = parameter.grad.untyped_storage()
        kind = self._known.get(storage)
        if kind is not None and kind[0] == "others":
            kind[0] = "gradients"
            self.others -= storage.nbytes()
            self.gradients += storage.nbytes()
            self.moments[self.gradients] = max(self.moments.get(self.gradients, 0), self.others)


def _run_two_steps(
    shape: ModelConfig, training: TrainingConfig, sequences: int, micro_batches: int, name: PrecisionName
) -> StepMemory:
    """Run a step that allocates what the optimizers and the loss keep, and a second one that is recorded."""
    with fake_tensor_mode(), MemoryTracker() as tracker:
        model = Transformer(shape).train()
        freeze_parameters(model, training)
        if training.quantize_base != "off":
            check_quantizable(model)
        optimizers = build_optimizers(model, training)
        step = ModelWithObjective(model, NextToken(training.loss))
        for parameter in filter(lambda one: one.requires_grad, model.parameters()):
            parameter.register_post_accumulate_grad_hook(tracker.mark_gradient)  # type: ignore[no-untyped-call]
        precision = cpu_precision(name)
        parts = training.context_parallel
        if parts > 1:  # the first rank gathers most
            model.set_sequence_shard(ContextParallelShard(0, parts, lambda own: torch.cat([own] * parts)))
        tokens = torch.zeros((sequences, shape.max_position_embeddings // parts), dtype=torch.int64)
        batch = Batch(tokens, tokens, None, tokens.numel())
        _step(step, batch, micro_batches, precision, optimizers, training.max_grad_norm)
        base = tracker.others
        tracker.moments.clear()
        _step(step, batch, micro_batches, precision, optimizers, training.max_grad_norm)
        weights = sum(parameter.nbytes for parameter in model.parameters())
        optimizer = state_bytes(optimizers)
        moments = tuple((gradients, others - base) for gradients, others in tracker.moments.items())
        # A quantized base model is computed, not run.
        saved = bytes_saved(model) if training.quantize_base != "off" else 0
        return StepMemory(weights - saved, optimizer, max(0, base - weights - optimizer), moments, saved)


def cpu_precision(name: PrecisionName) -> Precision:
    """A precision on the CPU whose tensors have the same sizes. bf16 stands in for fp16.

    Args:
        name: The precision.
    """
    return Precision("fp32" if name == "fp32" else "bf16", torch.device("cpu"))


def state_bytes(optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Bytes of the tensors that optimizers keep.

    Args:
        optimizers: The optimizers.
    """
    state = (
        tensor
        for optimizer in optimizers
        for values in optimizer.state.values()
        for tensor in values.values()
    )
    return sum(tensor.nbytes for tensor in state if isinstance(tensor, Tensor))


def _step(
    step: nn.Module,
    batch: Batch,
    micro_batches: int,
    precision: Precision,
    optimizers: list[torch.optim.Optimizer],
    max_norm: float,
) -> None:
    for _ in range(micro_batches):
        with precision.autocast():
            total = step(batch).total
        cast(Any, total).backward()
        del total
    clip_gradients(step.parameters(), max_norm)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
