"""What a rank of a pipeline holds in memory: its stages run on tensors without contents, and the order in
which its schedule runs them.

One micro-batch through one stage is run as `footprint.py` runs a step, and what it leaves behind for its
backward pass is noted. How many micro-batches wait for theirs at once is the schedule's affair: GPipe lets
all of a step's wait, 1F1B at most as many as there are stages from here to the end, interleaved stages more
than that, each of them smaller. Both together give the highest moment without running a schedule of a hundred
micro-batches.

Autocast makes its narrow copies of the weights anew for each micro-batch, and each waits with its own: that
is counted, because it is so.
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
    Ledger,
    alike_in_rate,
    counted_precision,
    depth_unit,
    precision_of,
    state_bytes,
)
from llm_trainer.training.objectives.objective import NextToken
from llm_trainer.training.optim.optimizers import build_optimizers
from llm_trainer.training.optim.param_groups import freeze_parameters, trainable_sizes

Moments = tuple[tuple[int, int], ...]  # bytes of gradients, and the most of all else beside them


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage. `kept` are the loss's buffers, `waiting` what a micro-batch leaves behind until its
    backward pass.

    `forward` is the most that is held inside a forward pass, and `first` and `later` are the moments of the stage's first backward pass
    in a step and of those that add to its gradients; in each, what this micro-batch left behind is counted. `update` are the optimizer's.
    """

    weights: int
    optimizer: int
    kept: int
    waiting: int
    forward: int
    first: Moments
    later: Moments
    update: Moments

    @property
    def gradients(self) -> int:
        """All of them."""
        return max((gradients for gradients, _ in self.later), default=0)


@dataclass(frozen=True)
class PlaceMemory:
    """Bytes on one rank of a pipeline: as for a step, and `buffers`, in which the schedule receives what its
    neighbours send.

    `moments` are the highest, where gradients are whole and where a rank keeps next to none of them.
    """

    weights: int
    optimizer: int
    kept: int
    buffers: int
    moments: Moments


def place_memories(
    shape: ModelConfig,
    training: TrainingConfig,
    *,
    ranks: int,
    sequences: int,
    micro_batches: int,
    precision: PrecisionName | None = None,
) -> list[PlaceMemory]:
    """What each rank of a pipeline of `ranks` needs for a step, in their order; otherwise as
    `footprint.step_memory`.

    Raises UsageError where a rank would train nothing.
    """
    check_trained(shape, training, ranks)
    training = alike_in_rate(training)
    schedule, name = training.pipeline_schedule, counted_precision(training, precision)
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
    places = []
    for place in range(ranks):
        numbers = range(place, count, ranks)
        stages = [stage(number) for number in numbers]
        neighbours = [(number > 0) + (number < count - 1) for number in numbers]
        order = schedule_order(schedule, ranks, place, micro_batches)
        sent = [
            stream * number if schedule == "interleaved" else 0 for number in neighbours
        ]  # torch lets go of it after the step
        places.append(
            PlaceMemory(
                sum(one.weights for one in stages),
                sum(one.optimizer for one in stages),
                sum(one.kept for one in stages),
                sum(neighbours) * micro_batches * stream,
                tuple(_highest(order, stages, sent, share) for share in (1.0, 0.0)),
            )
        )
    return places


def check_trained(shape: ModelConfig, training: TrainingConfig, ranks: int) -> None:
    """Raises UsageError for a pipeline of which a rank would train nothing."""
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


def schedule_order(schedule: str, ranks: int, place: int, micro_batches: int) -> list[tuple[str, int]]:
    """What one rank does in a step: ("forward" or "backward", which of its stages), as torch's schedules of
    these names do it.
    """
    if schedule == "gpipe":
        return [("forward", 0)] * micro_batches + [("backward", 0)] * micro_batches
    if schedule == "1f1b":
        ahead = min(micro_batches, ranks - place)
        return (
            [("forward", 0)] * ahead
            + [("backward", 0), ("forward", 0)] * (micro_batches - ahead)
            + [("backward", 0)] * ahead
        )
    own = stages_of(schedule, 1)
    each = micro_batches // max(1, micro_batches // ranks)  # so many of one stage, then as many of the next
    ahead = min((own - 1) * each + 2 * (ranks - 1 - place), own * micro_batches)
    order = [("forward", number // each % own) for number in range(ahead)]
    for number in range(own * micro_batches):
        if ahead + number < own * micro_batches:
            order.append(("forward", (ahead + number) // each % own))
        order.append(("backward", own - 1 - number // each % own))
    return order


def _highest(
    order: Sequence[tuple[str, int]], stages: Sequence[StageMemory], sent: Sequence[int], share: float
) -> tuple[int, int]:
    """The highest moment of a step where a rank keeps `share` of the gradients: bytes of these, and of all
    else.

    `sent`: what stays of a micro-batch that has been through a stage in both directions.
    """
    waiting, begun, left = [0] * len(stages), [False] * len(stages), 0
    moments = [(0, 0)]
    for what, own in order:
        stage = stages[own]
        waiting[own] -= what == "backward"
        others = left + sum(number * one.waiting for number, one in zip(waiting, stages, strict=True))
        there = sum(one.gradients for at, one in enumerate(stages) if begun[at] and at != own)
        if what == "forward":
            moments.append((there + stage.gradients * begun[own], others + stage.forward))
            waiting[own] += 1
        else:
            moments += [
                (there + mine, others + beside)
                for mine, beside in (stage.later if begun[own] else stage.first)
            ]
            begun[own] = True
            left += sent[own]
    for at, stage in enumerate(stages):
        there = sum(one.gradients for other, one in enumerate(stages) if other != at)
        moments += [(there + mine, beside) for mine, beside in stage.update]
    return _largest(moments, share)


def _largest(moments: Iterable[tuple[int, int]], share: float) -> tuple[int, int]:
    return max(moments, key=lambda moment: share * moment[0] + moment[1])


def _stage_memory(
    shape: ModelConfig,
    training: TrainingConfig,
    kind: tuple[bool, bool, int],
    sequences: int,
    name: PrecisionName,
) -> StageMemory:
    """`kind`: whether the stage is the first, whether the last, and its layers. A deep one is carried on from
    two shallow ones.
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

    def on(first: int, second: int) -> int:
        return second + round((second - first) * times)

    def moments_on(first: Moments, second: Moments) -> Moments:
        found = []
        for share in (1.0, 0.0):
            one, other = _largest(first, share), _largest(second, share)
            found.append((on(one[0], other[0]), on(one[1], other[1])))
        return tuple(found)

    return StageMemory(
        weights=on(low.weights, high.weights),
        optimizer=on(low.optimizer, high.optimizer),
        kept=on(low.kept, high.kept),
        waiting=on(low.waiting, high.waiting),
        forward=on(low.forward, high.forward),
        first=moments_on(low.first, high.first),
        later=moments_on(low.later, high.later),
        update=moments_on(low.update, high.update),
    )


@dataclass(frozen=True)
class _Part:
    """A stage of a model of this shape: the `number`-th of `count`, with these blocks, first and last + 1."""

    shape: ModelConfig
    number: int
    count: int
    blocks: tuple[int, int]


def _like(shape: ModelConfig, kind: tuple[bool, bool, int]) -> _Part:
    """A stage of this kind, of a model that has no blocks beside it."""
    is_first, is_last, layers = kind
    alone = shape.model_copy(update={"num_hidden_layers": layers})
    return _Part(alone, 0 if is_first else 1, (1 if is_last else 2) + (not is_first), (0, layers))


def _run_stage(part: _Part, training: TrainingConfig, sequences: int, name: PrecisionName) -> StageMemory:
    """A stage, two steps of two micro-batches; the second step is noted."""
    shape = part.shape
    with fake_tensor_mode(), Ledger() as ledger:
        model = Transformer(shape).train()
        freeze_parameters(model, training)
        stage = ModelStage(model, part.number, part.count, part.blocks)
        drop_other_stages(model, [stage])
        for parameter in model.parameters():
            if is_on_other_stage(parameter):
                parameter.requires_grad_(False)
            elif parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(ledger.is_gradient)  # type: ignore[no-untyped-call]
        is_trained = any(parameter.requires_grad for parameter in model.parameters())
        optimizers = build_optimizers(model, training) if is_trained else []
        objective, precision = NextToken(training.loss), precision_of(name)
        ids = torch.zeros((sequences, shape.max_position_embeddings), dtype=torch.int64)
        sent = torch.zeros(
            (*ids.shape, shape.hidden_size)
        )  # by the neighbours: hidden states or their gradients
        run = _Passes(stage, objective, precision, ids, sent, ledger)
        own = [parameter for parameter in model.parameters() if not is_on_other_stage(parameter)]
        run.step(optimizers, own, training.max_grad_norm)
        run.base = ledger.others
        run.step(optimizers, own, training.max_grad_norm)
        weights = sum(parameter.nbytes for parameter in own)
        held = state_bytes(optimizers)
        kept = max(0, run.base - weights - held - ids.nbytes - sent.nbytes)
        return StageMemory(weights, held, kept, run.waiting, run.forward, run.first, run.later, run.update)


class _Passes:
    """The passes of one stage over two micro-batches, one after the other, and what was noted of them above
    `base`.
    """

    def __init__(
        self,
        stage: ModelStage,
        objective: NextToken,
        precision: Precision,
        ids: Tensor,
        sent: Tensor,
        ledger: Ledger,
    ) -> None:
        self._stage, self._objective, self._precision, self._ids, self._sent, self._ledger = (
            stage,
            objective,
            precision,
            ids,
            sent,
            ledger,
        )
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
        self._ledger.moments.clear()
        clip_gradients(parameters, max_norm)
        for optimizer in optimizers:
            optimizer.step()
        self.update = self._noted()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _micro_batch(self) -> Moments:
        stage, ledger = self._stage, self._ledger
        ledger.moments.clear()
        given = self._ids if stage.is_first else self._sent.detach().requires_grad_()
        out = stage(given)
        if stage.is_last:
            with self._precision.autocast():
                out = self._objective.from_hidden_states(stage.submodel, out, self._ids).total
        self.waiting = ledger.others - self.base
        self.forward = max(others for _, others in self._noted())
        ledger.moments.clear()
        if cast(Tensor, out).requires_grad:
            cast(Tensor, out).backward(None if stage.is_last else self._sent)  # type: ignore[no-untyped-call]
        return self._noted()

    def _noted(self) -> Moments:
        return tuple((gradients, others - self.base) for gradients, others in self._ledger.moments.items())
