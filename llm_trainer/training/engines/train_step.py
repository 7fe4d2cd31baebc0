"""One optimizer step: forward and backward passes of its micro-batches, one division, clipping, update.

The tokens of the whole step are counted before the first backward pass, which the batches' labels allow. So
each micro-batch's sum is divided by the same number, and the gradient is that of one large batch. Nothing
here waits for the device. A gradient that is not finite is detected there and makes the optimizers change
nothing (`found_inf`, torch's own mechanism for fused optimizers). The loop learns of it when it reads the
outcome.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm_trainer.config import LLMTrainerError, TrainingConfig
from llm_trainer.data.sampling.batch import Batch
from llm_trainer.distributed.dropout_seed import seed_dropout
from llm_trainer.distributed.parallelize import device_mesh_of, full_tensor, no_sync
from llm_trainer.distributed.process_group import ProcessGroup
from llm_trainer.training.engines.precision import Precision
from llm_trainer.training.logging.timers import StepTimers
from llm_trainer.training.optim.optimizer_offload import step_offloaded
from llm_trainer.training.state import TrainingState

NormOf = Callable[[Callable[[Sequence[Tensor]], Tensor]], Tensor]


class TrainingDivergedError(LLMTrainerError):
    """Losses or gradients were not finite for too many steps in a row."""


@dataclass(frozen=True)
class SampleRange:
    """The samples that a step consumed: `first` to `first + count - 1`, numbered through the run."""

    first: int
    count: int

    def __str__(self) -> str:
        return f"samples {self.first} to {self.first + self.count - 1}"


@dataclass(frozen=True)
class StepOutcome:
    """The outcome of a step. Tensors stay on the device until they are read.

    Attributes:
        step: Number of the step, from 1.
        samples: The samples that it consumed.
        tokens: Its supervised tokens, over all ranks.
        lr_factor: Factor on the peak learning rates.
        loss: Mean loss over `tokens`, in nats.
        gradient_norm: Norm of the gradient before clipping.
        skipped: 1 where nothing was changed, else 0.
    """

    step: int
    samples: SampleRange
    tokens: int
    lr_factor: float
    loss: Tensor
    gradient_norm: Tensor
    skipped: Tensor


@dataclass
class GradientSync:
    """When a rank sends gradients to others in a step.

    Attributes:
        is_delayed: Gradients stay on the rank until `sync_gradients`.
        has_begun: Set when the pass starts in which they are sent.
    """

    is_delayed: bool = False
    has_begun: bool = False


class Outcomes:
    """Outcomes of steps, which stay on the device until `flush`.

    Args:
        training: The settings `max_skipped_steps` and those of the loss-spike rule.
        log: Called with a line for each step that was skipped.

    Attributes:
        last: The latest outcome read, a skipped step's included.
    """

    def __init__(self, training: TrainingConfig, log: Callable[[str], None]) -> None:
        self._training, self._log = training, log
        self._unread: list[StepOutcome] = []
        self.last: StepOutcome | None = None

    def add(self, outcome: StepOutcome) -> None:
        """Add the outcome of a step, without reading it."""
        self._unread.append(outcome)

    def flush(self, state: TrainingState) -> None:
        """Read the outcomes since the last call, and log the steps that were skipped.

        Args:
            state: The run's state, which counts skipped steps and losses.

        Raises:
            TrainingDivergedError: If `max_skipped_steps` steps in a row were skipped.
        """
        for outcome in self._unread:
            self.last = outcome
            if not bool(outcome.skipped):
                state.skipped_in_a_row = 0
                state.spikes.update(outcome.step, float(outcome.loss), self._training)
                continue
            reason = (
                f"loss {float(outcome.loss):g}, gradient norm {float(outcome.gradient_norm):g}"
                if outcome.tokens
                else "no supervised token"
            )
            self._log(f"step {outcome.step} skipped: {reason} ({outcome.samples})")
            state.skipped_steps += 1
            state.skipped_in_a_row += 1
            if state.skipped_in_a_row >= self._training.max_skipped_steps:
                raise TrainingDivergedError(
                    f"{state.skipped_in_a_row} steps in a row without a finite loss and gradient, the last "
                    f"on {outcome.samples}; lower learning_rate, raise warmup_steps, or look at those "
                    "samples (limit: max_skipped_steps)"
                )
        self._unread.clear()


def forward_backward(
    step: nn.Module,
    batches: Sequence[Batch],
    tokens: int,
    precision: Precision,
    *,
    seed: int | None,
    index: int,
    process_group: ProcessGroup | None = None,
    timings: StepTimers | None = None,
    sync: GradientSync | None = None,
) -> Tensor:
    """Add the gradient of Σ loss / `tokens`, over the micro-batches of all ranks, to the parameters.

    Args:
        step: The model with its objective, wrapped for its ranks.
        batches: This rank's micro-batches.
        tokens: Supervised tokens of the whole step, over all ranks.
        precision: Precision of the passes.
        seed: Determines dropout, together with `index`; None leaves the generator as it is.
        index: Updates before this one.
        process_group: The ranks (default: this process alone).
        timings: Measures the passes.
        sync: Delays the gradients, or records when they are sent. With it, the loss is not summed over ranks.

    Returns:
        The mean loss, without a graph.
    """
    device, process_group, timings = (
        precision.device,
        process_group or ProcessGroup(),
        timings or StepTimers(precision.device),
    )
    sums_loss, sync = sync is None, sync or GradientSync()
    mean = torch.zeros((), device=device)
    for number, batch in enumerate(batches):
        if seed is not None:
            seed_dropout(seed, index, number, process_group.token_rank, device)
        sends = number == len(batches) - 1 and not sync.is_delayed
        with nullcontext() if sends else no_sync(step):
            with timings.measure("forward"), precision.autocast():
                total = step(batch.to(device)).total / max(tokens, 1)
            mean += total.detach()
            sync.has_begun = sends
            with timings.measure("backward"):
                (total if precision.scaler is None else precision.scaler.scale(total)).backward()
    return process_group.all_reduce_tensor(mean) if sums_loss else mean


def sync_gradients(step: nn.Module, batch: Batch, precision: Precision) -> None:
    """Sum gradients that were kept on each rank, in the exact order of an ordinary step: by a pass of one
    token whose own gradient is zero.

    Args:
        step: The model with its objective, wrapped for its ranks.
        batch: Any batch.
        precision: Precision of the pass.
    """
    with precision.autocast():
        zero = step(batch.first(1, 1).to(precision.device)).total * 0.0
    zero.backward()


def clip_gradients(parameters: Iterable[Tensor], max_norm: float, norm_of: NormOf | None = None) -> Tensor:
    """Scale gradients down to a joint 2-norm.

    Args:
        parameters: The parameters.
        max_norm: The largest norm; 0 leaves the gradients as they are.
        norm_of: As for `update`.

    Returns:
        The norm before clipping.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    norm = gradient_norm(with_gradient) if norm_of is None else norm_of(gradient_norm)
    if max_norm > 0:
        for group in _by_mesh(with_gradient):
            torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The joint 2-norm of the gradients of parameters, which may be full, or sharded in several ways.

    Args:
        parameters: The parameters. Those without a gradient are ignored.
    """
    norms = [
        full_tensor(torch.nn.utils.get_total_norm([_gradient(parameter) for parameter in group]))
        for group in _by_mesh(parameters)
    ]
    return norms[0] if len(norms) == 1 else torch.nn.utils.get_total_norm(norms)


def _by_mesh(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Parameters with a gradient, in groups that torch can combine: those sharded over the same ranks, and
    the full ones.
    """
    groups: dict[object, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault(device_mesh_of(parameter), []).append(parameter)
    return list(groups.values())


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def update(
    optimizers: Sequence[torch.optim.Optimizer],
    parameters: Sequence[Tensor],
    loss: Tensor,
    tokens: int,
    precision: Precision,
    max_grad_norm: float,
    *,
    offload: bool = False,
    norm_of: NormOf | None = None,
) -> tuple[Tensor, Tensor]:
    """Clip gradients and let the optimizers step, then clear the gradients. Nothing is changed if the loss or
    a gradient is not finite, or if no token was supervised.

    Args:
        optimizers: The optimizers.
        parameters: The parameters whose gradients are clipped.
        loss: Mean loss of the step.
        tokens: Supervised tokens of the step, over all ranks.
        precision: Holds the gradient scaler.
        max_grad_norm: As for `clip_gradients`.
        offload: Whether the optimizers' state is in host memory between steps.
        norm_of: Computes the norm of all gradients, where other ranks hold other parameters, from the
            function
            that computes it of some.

    Returns:
        The gradient's norm before clipping, and 1 if the step was skipped, else 0.
    """
    if precision.scaler is not None:
        for optimizer in optimizers:
            precision.scaler.unscale_(optimizer)
    norm = clip_gradients(parameters, max_grad_norm, norm_of)
    skipped = torch.logical_not(torch.isfinite(norm) & torch.isfinite(loss)).float()
    if tokens == 0:
        skipped = torch.ones_like(skipped)
    for optimizer in optimizers:
        optimizer.found_inf = skipped  # type: ignore[attr-defined]
        if offload:
            step_offloaded(optimizer)
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if precision.scaler is not None:
        precision.scaler.update()
    return norm, skipped
