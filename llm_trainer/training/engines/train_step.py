"""One optimizer step: micro-batches forward and backward, one division, clipping, update.

The tokens of the whole step are counted before the first backward pass, which the batches' labels allow, so
each micro-batch's sum is divided by the same number and the gradient is that of one large batch. Nothing here
waits for the device: a gradient that is not finite is found there and makes the optimizers leave everything
as it is (`found_inf`, torch's own mechanism for fused optimizers), and the loop learns of it when it reads
the outcome.
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
    """Losses or gradients are not finite for too many steps in a row."""


@dataclass(frozen=True)
class SampleRange:
    """Which samples a step consumed: `first` to `first + count - 1`, numbered through the run."""

    first: int
    count: int

    def __str__(self) -> str:
        return f"samples {self.first} to {self.first + self.count - 1}"


@dataclass(frozen=True)
class StepOutcome:
    """What a step came to; tensors stay on the device until they are read. `loss` is the mean over `tokens`
    in nats.
    """

    step: int
    samples: SampleRange
    tokens: int
    rate_factor: float
    loss: Tensor
    gradient_norm: Tensor
    skipped: Tensor


@dataclass
class GradientSync:
    """What a rank sends to others in a step: where it `is_delayed`, gradients stay its own until `sync_gradients`;
    `has_begun` is set when the pass starts in which they are sent.
    """

    is_delayed: bool = False
    has_begun: bool = False


class Outcomes:
    """Outcomes of steps, left on the device until somebody looks: `last` is the last one read that was not
    skipped.
    """

    def __init__(self, training: TrainingConfig, log: Callable[[str], None]) -> None:
        self._training, self._log = training, log
        self._unread: list[StepOutcome] = []
        self.last: StepOutcome | None = None

    def add(self, outcome: StepOutcome) -> None:
        """One step more, not looked at yet."""
        self._unread.append(outcome)

    def flush(self, state: TrainingState) -> None:
        """Look at the steps since the last look: name what was skipped. Raises TrainingDivergedError for a run
        that only skips.
        """
        for outcome in self._unread:
            if not bool(outcome.skipped):
                state.skipped_in_a_row = 0
                self.last = outcome
                state.spikes.update(outcome.step, float(outcome.loss), self._training)
                continue
            reason = (
                f"loss {float(outcome.loss):g}, gradient norm {float(outcome.gradient_norm):g}"
                if outcome.tokens
                else "no supervised token"
            )
            self._log(f"step {outcome.step} skipped: {reason} ({outcome.samples})")
            state.skipped_in_a_row += 1
            if state.skipped_in_a_row >= self._training.max_skipped_steps:
                raise TrainingDivergedError(
                    f"{state.skipped_in_a_row} steps in a row without a finite loss and gradient, the last on {outcome.samples}; "
                    "lower learning_rate, raise warmup_steps, or look at those samples (limit: max_skipped_steps)"
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
    """Add the gradient of Σ loss / `tokens` over the micro-batches of all ranks to the parameters; returns
    that mean loss (detached).

    `tokens` are the supervised tokens of the whole step, on all ranks. `seed` (None: leave the generator alone) and the step's `index`
    fix dropout. With `sending` the returned loss is this rank's part; what was sent is noted there.
    """
    device, process_group, timings = (
        precision.device,
        process_group or ProcessGroup(),
        timings or StepTimers(precision.device),
    )
    alone, sync = sync is None, sync or GradientSync()
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
    return process_group.all_reduce_tensor(mean) if alone else mean


def sync_gradients(step: nn.Module, batch: Batch, precision: Precision) -> None:
    """Sum gradients that were kept apart over the ranks, in the very order of an ordinary step: by a pass
    whose own gradient is zero, of one token of `batch`.
    """
    with precision.autocast():
        nothing = step(batch.first(1, 1).to(precision.device)).total * 0.0
    nothing.backward()


def clip_gradients(parameters: Iterable[Tensor], max_norm: float, norm_of: NormOf | None = None) -> Tensor:
    """Scale gradients down to a joint 2-norm of `max_norm` (0: leave them); returns the norm before.
    `norm_of`: see `update`.
    """
    held = [parameter for parameter in parameters if parameter.grad is not None]
    norm = gradient_norm(held) if norm_of is None else norm_of(gradient_norm)
    if max_norm > 0:
        for alike in _by_mesh(held):
            torch.nn.utils.clip_grads_with_norm_(alike, max_norm, norm)
    return norm


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The joint 2-norm of the gradients of parameters, whole or cut over ranks in one way or several."""
    norms = [
        full_tensor(torch.nn.utils.get_total_norm([_gradient(one) for one in alike]))
        for alike in _by_mesh(parameters)
    ]
    return norms[0] if len(norms) == 1 else torch.nn.utils.get_total_norm(norms)


def _by_mesh(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Those with a gradient, in groups that torch can take together: on the same ranks, or whole."""
    alike: dict[object, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            alike.setdefault(device_mesh_of(parameter), []).append(parameter)
    return list(alike.values())


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
    """Clip and let the optimizers step, unless loss or gradient is not finite or no token was supervised;
    clears the gradients.

    With `offload` the optimizers' state is in host memory after it. `norm_of` makes the norm of all
    gradients, where other ranks hold other parameters, from the function that makes it of some. Returns the
    gradient's norm before clipping and whether the step was skipped (1) or taken (0).
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
