"""Estimates the memory of each rank of a pipeline, from runs of its stages on tensors without contents.

One micro-batch runs through one stage as in `memory_estimator.py`, and what it saves for its backward pass is
recorded. How many micro-batches wait for their backward pass at once depends on the schedule. GPipe lets all
of a step wait, 1F1B at most as many as there are stages from this one to the last, interleaved stages more
than that, each of them smaller. Both together give the peak without running a schedule of a hundred
micro-batches.

Autocast makes new bf16 copies of the weights for each micro-batch, and each waits with its own copies. They
are counted, because they are really held.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from llm_trainer.config import TrainingConfig, UsageError
from llm_trainer.config.resolve.parallelism import stages_of
from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.distributed.parallelize import is_on_other_stage
from llm_trainer.distributed.pipeline import NOTHING_TRAINABLE, ModelStage, drop_other_stages, stage_bounds
from llm_trainer.model.transformer import Transformer
from llm_trainer.torch_compat import fake_tensor_mode
from llm_trainer.training.engines.precision import Precision, PrecisionName
from llm_trainer.training.engines.train_step import clip_gradients
from llm_trainer.training.memory.memory_estimator import (
    MemoryTracker,
    assumed_precision,
    cpu_precision,
    depth_unit,
    state_bytes,
    without_lr_multipliers,
)
from llm_trainer.training.objectives.objective import NextToken
from llm_trainer.training.optim.optimizers import build_optimizers
from llm_trainer.training.optim.param_groups import freeze_parameters, trainable_sizes

Moments = tuple[tuple[int, int], ...]  # bytes of gradients, and the most of all else held with them


@dataclass(frozen=True)
class StageMemory:
    """Memory of one stage, in bytes.

    Attributes:
        weights: Weights.
        optimizer: Optimizer state.
        loss_buffers: Buffers that the loss keeps between steps.
        waiting: What a micro-batch keeps until its backward pass.
        forward: The peak inside a forward pass.
        first: The peaks inside the first backward pass of a step.
        later: The peaks inside backward passes that add to existing gradients. What the micro-batch kept is
            counted in both.
        update: The peaks inside the optimizers' update.
    """

    weights: int
    optimizer: int
    loss_buffers: int
    waiting: int
    forward: int
    first: Moments
    later: Moments
    update: Moments

    @property
    def gradients(self) -> int:
        """Bytes of all gradients."""
        return max((gradients for gradients, _ in self.later), default=0)


@dataclass(frozen=True)
class PipelineRankMemory:
    """Memory of one rank of a pipeline, in bytes.

    Attributes:
        weights: Weights.
        optimizer: Optimizer state.
        loss_buffers: Buffers that the loss keeps between steps.
        buffers: Buffers into which the schedule receives from neighbouring stages.
        moments: The peaks of a step: for a rank that holds all of its gradients, and for one that shards them
            into negligible parts. Each is bytes of gradients and of everything else.
    """

    weights: int
    optimizer: int
    loss_buffers: int
    buffers: int
    moments: Moments


def pipeline_rank_memories(
    shape: ModelConfig,
    training: TrainingConfig,
    *,
    ranks: int,
    sequences: int,
    micro_batches: int,
    precision: PrecisionName | None = None,
) -> list[PipelineRankMemory]:
    """Estimate what each rank of a pipeline needs for a step.

    Args:
        shape: The model's shape.
        training: The settings.
        ranks: Ranks of the pipeline.
        sequences: Sequences per micro-batch.
        micro_batches: Micro-batches per step.
        precision: The precision that stands in for `auto` (default: bf16).

    Returns:
        The memory of each rank, in their order.

    Raises:
        UsageError: If a rank would train nothing.
    """
    check_all_ranks_train(shape, training, ranks)
    training = without_lr_multipliers(training)
    schedule, name = training.pipeline_schedule, assumed_precision(training, precision)
    count = stages_of(schedule, ranks)
    bounds = stage_bounds(shape.num_hidden_layers, count)
    known: dict[tuple[bool, bool, int], StageMemory] = {}

    def stage(number: int) -> StageMemory:
        if training.freeze_layers:  # frozen blocks are not like the others
            return _run_stage(_Part(shape, number, count, bounds[number]), training, sequences, name)
        kind = (number == 0, number == count - 1, bounds[number][1] - bounds[number][0])
        if kind not in known:
            known[kind] = _stage_memory(shape, training, kind, sequences, name)
        return known[kind]

    stream = 4 * sequences * shape.max_position_embeddings * shape.hidden_size
    memories = []
    for rank in range(ranks):
        numbers = range(rank, count, ranks)
        stages = [stage(number) for number in numbers]
        neighbours = [(number > 0) + (number < count - 1) for number in numbers]
        order = schedule_order(schedule, ranks, rank, micro_batches)
        # torch releases it only after the step.
        sent = [stream * number if schedule == "interleaved" else 0 for number in neighbours]
        memories.append(
            PipelineRankMemory(
                sum(one.weights for one in stages),
                sum(one.optimizer for one in stages),
                sum(one.loss_buffers for one in stages),
                sum(neighbours) * micro_batches * stream,
                tuple(_peak_of_step(order, stages, sent, fraction) for fraction in (1.0, 0.0)),
            )
        )
    return memories


def check_all_ranks_train(shape: ModelConfig, training: TrainingConfig, ranks: int) -> None:
    """Check that every rank of a pipeline has something to train.

    Args:
        shape: The model's shape.
        training: The setting `freeze_layers`.
        ranks: Ranks of the pipeline.

    Raises:
        UsageError: If a rank would train nothing.
    """
    if not training.freeze_layers:
        return
    count = stages_of(training.pipeline_schedule, ranks)
    bounds = stage_bounds(shape.num_hidden_layers, count)
    trains = set()
    for part in (part for part, size in trainable_sizes(shape, training).items() if size):
        name, _, layer = part.partition(".")
        stages = [
            number for number, (first, last) in enumerate(bounds) if layer and first <= int(layer) < last
        ]
        stages += [0] if name in ("wte", "wpe") else []
        stages += (
            [count - 1]
            if name in ("ln_f", "lm_head") or (name == "wte" and shape.tie_word_embeddings)
            else []
        )
        trains |= {number % ranks for number in stages}
    if len(trains) < ranks:
        raise UsageError(NOTHING_TRAINABLE)


def schedule_order(schedule: str, ranks: int, rank: int, micro_batches: int) -> list[tuple[str, int]]:
    """The passes of one rank in a step, as torch's schedules order them.

    Args:
        schedule: gpipe, 1f1b or interleaved.
        ranks: Ranks of the pipeline.
        rank: This rank.
        micro_batches: Micro-batches per step.

    Returns:
        For each pass `forward` or `backward`, and the number of the stage among those of the rank.
    """
    if schedule == "gpipe":
        return [("forward", 0)] * micro_batches + [("backward", 0)] * micro_batches
    if schedule == "1f1b":
        ahead = min(micro_batches, ranks - rank)
        return (
            [("forward", 0)] * ahead
            + [("backward", 0), ("forward", 0)] * (micro_batches - ahead)
            + [("backward", 0)] * ahead
        )
    own = stages_of(schedule, 1)
    # A rank runs this many micro-batches through one stage, then as many through its next.
    each = micro_batches // max(1, micro_batches // ranks)
    ahead = min((own - 1) * each + 2 * (ranks - 1 - rank), own * micro_batches)
    order = [("forward", number // each % own) for number in range(ahead)]
    for number in range(own * micro_batches):
        if ahead + number < own * micro_batches:
            order.append(("forward", (ahead + number) // each % own))
        order.append(("backward", own - 1 - number // each % own))
    return order


def _peak_of_step(
    order: Sequence[tuple[str, int]], stages: Sequence[StageMemory], sent: Sequence[int], fraction: float
) -> tuple[int, int]:
    """The peak of a step on a rank that holds `fraction` of its gradients: bytes of gradients, and of all
    else.

    `sent` is what remains of a micro-batch after both passes through a stage.
    """
    waiting, has_gradients, left = [0] * len(stages), [False] * len(stages), 0
    moments = [(0, 0)]
    for what, own in order:
        stage = stages[own]
        waiting[own] -= what == "backward"
        others = left + sum(number * one.waiting for number, one in zip(waiting, stages, strict=True))
        of_others = sum(
            one.gradients for number, one in enumerate(stages) if has_gradients[number] and number != own
        )
        if what == "forward":
            moments.append((of_others + stage.gradients * has_gradients[own], others + stage.forward))
            waiting[own] += 1
        else:
            peaks = stage.later if has_gradients[own] else stage.first
            moments += [(of_others + gradients, others + rest) for gradients, rest in peaks]
            has_gradients[own] = True
            left += sent[own]
    for number, stage in enumerate(stages):
        of_others = sum(one.gradients for other, one in enumerate(stages) if other != number)
        moments += [(of_others + gradients, rest) for gradients, rest in stage.update]
    return _peak(moments, fraction)


def _peak(moments: Iterable[tuple[int, int]], fraction: float) -> tuple[int, int]:
    return max(moments, key=lambda moment: fraction * moment[0] + moment[1])


def _stage_memory(
    shape: ModelConfig,
    training: TrainingConfig,
    kind: tuple[bool, bool, int],
    sequences: int,
    name: PrecisionName,
) -> StageMemory:
    """Memory of a kind of stage: whether it is the first, whether the last, and its layers. A deep one is
    extrapolated from two shallow ones.
    """
    is_first, is_last, layers = kind
    unit = depth_unit(shape)
    if layers <= 3 * unit:
        return _run_stage(_like(shape, kind), training, sequences, name)
    low, high = (
        _run_stage(_like(shape, (is_first, is_last, times * unit)), training, sequences, name)
        for times in (2, 3)
    )
    times = (layers - 3 * unit) / unit

    def extrapolate(first: int, second: int) -> int:
        return second + round((second - first) * times)

    def extrapolate_peaks(first: Moments, second: Moments) -> Moments:
        peaks = []
        for fraction in (1.0, 0.0):
            one, other = _peak(first, fraction), _peak(second, fraction)
            peaks.append((extrapolate(one[0], other[0]), extrapolate(one[1], other[1])))
        return tuple(peaks)

    return StageMemory(
        weights=extrapolate(low.weights, high.weights),
        optimizer=extrapolate(low.optimizer, high.optimizer),
        loss_buffers=extrapolate(low.loss_buffers, high.loss_buffers),
        waiting=extrapolate(low.waiting, high.waiting),
        forward=extrapolate(low.forward, high.forward),
        first=extrapolate_peaks(low.first, high.first),
        later=extrapolate_peaks(low.later, high.later),
        update=extrapolate_peaks(low.update, high.update),
    )


@dataclass(frozen=True)
class _Part:
    """A stage of a model: number `number` of `count`, with the blocks from `blocks[0]` up to `blocks[1]`."""

    shape: ModelConfig
    number: int
    count: int
    blocks: tuple[int, int]


def _like(shape: ModelConfig, kind: tuple[bool, bool, int]) -> _Part:
    """A stage of this kind, of a model that has no other blocks."""
    is_first, is_last, layers = kind
    alone = shape.model_copy(update={"num_hidden_layers": layers})
    return _Part(alone, 0 if is_first else 1, (1 if is_last else 2) + (not is_first), (0, layers))


def _run_stage(part: _Part, training: TrainingConfig, sequences: int, name: PrecisionName) -> StageMemory:
    """Run two steps of two micro-batches through a stage. The second step is recorded."""
    shape = part.shape
    with fake_tensor_mode(), MemoryTracker() as tracker:
        model = Transformer(shape).train()
        freeze_parameters(model, training)
        stage = ModelStage(model, part.number, part.count, part.blocks)
        drop_other_stages(model, [stage])
        for parameter in model.parameters():
            if is_on_other_stage(parameter):
                parameter.requires_grad_(False)
            elif parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(tracker.mark_gradient)  # type: ignore[no-untyped-call]
        is_trained = any(parameter.requires_grad for parameter in model.parameters())
        optimizers = build_optimizers(model, training) if is_trained else []
        objective, precision = NextToken(training.loss), cpu_precision(name)
        ids = torch.zeros((sequences, shape.max_position_embeddings), dtype=torch.int64)
        # What neighbours send: hidden states or their gradients.
        sent = torch.zeros((*ids.shape, shape.hidden_size))
        run = _Passes(stage, objective, precision, ids, sent, tracker)
        own = [parameter for parameter in model.parameters() if not is_on_other_stage(parameter)]
        run.step(optimizers, own, training.max_grad_norm)
        run.base = tracker.others
        run.step(optimizers, own, training.max_grad_norm)
        weights = sum(parameter.nbytes for parameter in own)
        optimizer = state_bytes(optimizers)
        loss_buffers = max(0, run.base - weights - optimizer - ids.nbytes - sent.nbytes)
        return StageMemory(
            weights, optimizer, loss_buffers, run.waiting, run.forward, run.first, run.later, run.update
        )


class _Passes:
    """The passes of one stage over two micro-batches, and the peaks recorded in them above `base`."""

    def __init__(
        self,
        stage: ModelStage,
        objective: NextToken,
        precision: Precision,
        ids: Tensor,
        sent: Tensor,
        tracker: MemoryTracker,
    ) -> None:
        self._stage, self._objective, self._precision = stage, objective, precision
        self._ids, self._sent, self._tracker = ids, sent, tracker
        self.base = self.waiting = self.forward = 0
        self.first: Moments = ()
        self.later: Moments = ()
        self.update: Moments = ()

    def step(
        self, optimizers: Sequence[torch.optim.Optimizer], parameters: Sequence[Tensor], max_norm: float
    ) -> None:
        """One step: gradients from two micro-batches, and the update."""
        self._stage.begin_step(self._precision, None)
        self.first, self.later = self._micro_batch(), self._micro_batch()
        self._tracker.moments.clear()
        clip_gradients(parameters, max_norm)
        for optimizer in optimizers:
            optimizer.step()
        self.update = self._peaks()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _micro_batch(self) -> Moments:
        stage, tracker = self._stage, self._tracker
        tracker.moments.clear()
        given = self._ids if stage.is_first else self._sent.detach().requires_grad_()
        out = stage(given)
        if stage.is_last:
            with self._precision.autocast():
                out = self._objective.from_hidden_states(stage.submodel, out, self._ids).total
        self.waiting = tracker.others - self.base
        self.forward = max(others for _, others in self._peaks())
        tracker.moments.clear()
        if cast(Tensor, out).requires_grad:
            cast(Tensor, out).backward(None if stage.is_last else self._sent)  # type: ignore[no-untyped-call]
        return self._peaks()

    def _peaks(self) -> Moments:
        return tuple((gradients, others - self.base) for gradients, others in self._tracker.moments.items())
