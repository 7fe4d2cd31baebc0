"""What a training step holds in memory, found by running the step itself on tensors without contents.

The run's own model, loss and optimizers go through two steps in torch's FakeTensorMode, where a tensor has a
shape, a type and a life, but no memory, and a ledger notes what is alive after each operation. So the
estimate follows the code (a chunked loss, recomputation, what autocast keeps) without a second description of
it that could drift. A closed form was the alternative: faster still, and wrong after the next change of a
kernel. What a kernel uses inside itself is not seen.

A deep stack is not run whole: blocks are alike, so two shallow stacks are, and the difference is carried on
to the full depth. What a stage of a pipeline holds is found in the same way in `stage_footprint.py`.
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

_SHALLOW = 2  # layers that the step between two stacks has at least


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one step on one rank that holds the whole shape.

    `weights`, `optimizer` and `kept` (the loss's buffers) are there between steps; `moments` are the highest points inside a step: bytes of
    gradients held, and of everything else beside them (activations, temporaries). `in_bits` is how much more the weights were as floats.
    """

    weights: int
    optimizer: int
    kept: int
    moments: tuple[tuple[int, int], ...]
    in_bits: int = 0

    @property
    def between_steps(self) -> int:
        """What is held all the time."""
        return self.weights + self.optimizer + self.kept

    def peak(self, gradient_share: float = 1.0) -> int:
        """The step's highest point above `between_steps`, where a rank keeps this share of the gradients."""
        return max(
            (int(gradients * gradient_share) + others for gradients, others in self.moments), default=0
        )

    @property
    def activations(self) -> int:
        """The most that is held beside gradients."""
        return max((others for _, others in self.moments), default=0)


def step_memory(
    shape: ModelConfig,
    training: TrainingConfig,
    *,
    sequences: int,
    micro_batches: int = 1,
    precision: PrecisionName | None = None,
) -> StepMemory:
    """What a step of `micro_batches` × `sequences` at the full context needs, uncompiled, with kernels as on
    a CPU; where ranks share sequences, what the rank needs that gathers most.

    `precision` stands in for `auto` (default: bf16). From the third micro-batch on nothing is added, so two are run at most. Raises
    UsageError for a base that cannot be quantised where the settings ask for that.
    """
    run = (alike_in_rate(training), sequences, min(micro_batches, 2), counted_precision(training, precision))
    unit = depth_unit(shape)
    if shape.num_hidden_layers <= 3 * unit or training.freeze_layers:  # frozen blocks are not like the others
        return _run_twice(shape, *run)
    low, high = (
        _run_twice(shape.model_copy(update={"num_hidden_layers": times * unit}), *run) for times in (2, 3)
    )
    return _carried_on(low, high, (shape.num_hidden_layers - 3 * unit) / unit)


def counted_precision(training: TrainingConfig, precision: PrecisionName | None) -> PrecisionName:
    """What is counted with: `precision` where it is said, bf16 for `auto`."""
    return precision or ("bf16" if training.precision == "auto" else training.precision)


def alike_in_rate(training: TrainingConfig) -> TrainingConfig:
    """Settings without rates by part: they need no memory, and name parts that a shallow stack does not have."""
    return training.model_copy(update={"lr_multipliers": {}, "layerwise_lr_decay": 1.0})


def depth_unit(shape: ModelConfig) -> int:
    """Layers by which one shallow stack is deeper than another: whole turns of recomputation."""
    every = max(1, shape.activation_checkpoint_every) if shape.gradient_checkpointing else 1
    return every * -(-_SHALLOW // every)


def _carried_on(low: StepMemory, high: StepMemory, times: float) -> StepMemory:
    """`high` and `times` the difference of the two, for each share of the gradients the highest moment."""

    def on(first: int, second: int) -> int:
        return second + round((second - first) * times)

    moments = []
    for share in (1.0, 0.0):
        first, second = (
            max(one.moments, key=lambda moment: share * moment[0] + moment[1]) for one in (low, high)
        )
        moments.append((on(first[0], second[0]), on(first[1], second[1])))
    held = (on(low.weights, high.weights), on(low.optimizer, high.optimizer), on(low.kept, high.kept))
    return StepMemory(*held, tuple(moments), on(low.in_bits, high.in_bits))


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors alive, gradients apart, and the highest moments."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gradients, self.others = 0, 0
        self.moments: dict[int, int] = {}  # bytes of gradients → the most of others beside them
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, list[str]] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is item_op():
            return 1  # whoever looks at a number here asks whether all is well
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return result

    def _note(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta":  # what another stage of a pipeline holds
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

    def is_gradient(self, parameter: Tensor) -> None:
        """A parameter's gradient has come: count it as one."""
        if parameter.grad is None:
            return
        storage = parameter.grad.untyped_storage()
        kind = self._known.get(storage)
        if kind is not None and kind[0] == "others":
            kind[0] = "gradients"
            self.others -= storage.nbytes()
            self.gradients += storage.nbytes()
            self.moments[self.gradients] = max(self.moments.get(self.gradients, 0), self.others)


def _run_twice(
    shape: ModelConfig, training: TrainingConfig, sequences: int, micro_batches: int, name: PrecisionName
) -> StepMemory:
    """The first step makes what the optimizers and the loss keep; the second is the one that is noted."""
    with fake_tensor_mode(), Ledger() as ledger:
        model = Transformer(shape).train()
        freeze_parameters(model, training)
        if training.quantize_base != "off":
            check_quantizable(model)
        optimizers = build_optimizers(model, training)
        step = ModelWithObjective(model, NextToken(training.loss))
        for parameter in filter(lambda one: one.requires_grad, model.parameters()):
            parameter.register_post_accumulate_grad_hook(ledger.is_gradient)  # type: ignore[no-untyped-call]
        precision = precision_of(name)
        parts = training.context_parallel
        if parts > 1:  # the first rank gathers most
            model.set_sequence_shard(ContextParallelShard(0, parts, lambda own: torch.cat([own] * parts)))
        tokens = torch.zeros((sequences, shape.max_position_embeddings // parts), dtype=torch.int64)
        batch = Batch(tokens, tokens, None, tokens.numel())
        _step(step, batch, micro_batches, precision, optimizers, training.max_grad_norm)
        base = ledger.others
        ledger.moments.clear()
        _step(step, batch, micro_batches, precision, optimizers, training.max_grad_norm)
        weights = sum(parameter.nbytes for parameter in model.parameters())
        held = state_bytes(optimizers)
        moments = tuple((gradients, others - base) for gradients, others in ledger.moments.items())
        in_bits = (
            bytes_saved(model) if training.quantize_base != "off" else 0
        )  # a base in four bits is counted, not run
        return StepMemory(weights - in_bits, held, max(0, base - weights - held), moments, in_bits)


def precision_of(name: PrecisionName) -> Precision:
    """Arithmetic with the sizes of this one: fp16 has those of bf16."""
    return Precision("fp32" if name == "fp32" else "bf16", torch.device("cpu"))


def state_bytes(optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Bytes of the tensors that optimizers keep."""
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
