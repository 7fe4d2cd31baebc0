"""Pipeline parallelism: the layers in stages, each on ranks of its own, and micro-batches that follow each
other through them.

The schedules are torch's (GPipe, Huang et al. 2019, arXiv:1811.06965; 1F1B, Narayanan et al. 2019;
interleaved, Narayanan et al. 2021, arXiv:2104.04473); a step's micro-batches are theirs. A stage is the model
itself seen through a window: the same modules under the same names, with its own blocks only, and what other
stages hold is on the meta device, so that it has names and shapes and takes no memory. The embedding of a
model that ties it to the head is on the first and the last stage, which sum its gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from llm_trainer.config import UsageError
from llm_trainer.config.resolve.parallelism import stages_of
from llm_trainer.data.sampling.samplers import Batch
from llm_trainer.distributed.process_group import Ranks
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.engines.precision import Precision
from llm_trainer.training.objectives.objective import LossSum, NextToken, seed_dropout

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NOTHING_TRAINED = (
    "a stage of the pipeline has nothing to train: all of its parameters are frozen; use fewer stages"
)


def stage_bounds(layers: int, stages: int) -> list[tuple[int, int]]:
    """First and last + 1 block of each stage: as equal as can be, the earlier ones, which hold no head,
    longer.
    """
    return [(-(-layers * stage // stages), -(-layers * (stage + 1) // stages)) for stage in range(stages)]


class Stage(nn.Module):
    """One stage: ids or hidden states in, hidden states out. `model` is the whole one, of which it runs its
    own part: `blocks`, first and last + 1 (default: those of its place).
    """

    def __init__(
        self, model: Transformer, number: int, count: int, blocks: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.number, self.is_first, self.is_last = number, number == 0, number == count - 1
        first, last = blocks or stage_bounds(model.config.num_hidden_layers, count)[number]
        self.window = copy.copy(model)
        self.window._modules = dict(model._modules)
        self.window.blocks = nn.ModuleList(model.blocks[first:last])
        if not self.is_first:
            self.window.embed = lambda hidden, *places: hidden  # type: ignore[method-assign]
        if not self.is_last:
            self.window.ln_f = nn.Identity()
        self.precision: Precision | None = None
        self.seeds: tuple[int, int, int] | None = None  # seed, step, rank: of dropout
        self._passes = 0

    def forward(self, x: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """ids (B, T) or hidden states (B, T, C) → hidden states (B, T, C)."""
        assert self.precision is not None
        if self.seeds is not None and self.training:
            seed, step, rank = self.seeds
            seed_dropout(seed, step, self._passes, rank, self.precision.device)
        self._passes += 1
        with self.precision.autocast():
            return self.window.hidden_states(x, document_ids=document_ids)

    def begin_step(self, precision: Precision, seeds: tuple[int, int, int] | None) -> None:
        """Before the first micro-batch of a step."""
        self.precision, self.seeds, self._passes = precision, seeds, 0


class Pipeline(nn.Module):
    """This rank's stages of `model`, whose other parts go to the meta device. Raises UsageError for what
    cannot be cut into stages.
    """

    def __init__(
        self, model: Transformer, objective: NextToken, ranks: Ranks, schedule: str, device: torch.device
    ) -> None:
        super().__init__()
        plan = ranks.plan
        self.objective = objective
        self.schedule, self.device, self.width = schedule, device, model.config.hidden_size
        self.count = stages_of(schedule, plan.pipeline_parallel)
        if model.config.has_adapters:
            raise UsageError(
                "adapters do not go with a pipeline, where the ends of a model are on different ranks; use fsdp with them"
            )
        self.place = plan.stage(ranks.rank)
        self.size = plan.pipeline_parallel
        self.stages = nn.ModuleList(
            Stage(model, number, self.count) for number in range(self.place, self.count, self.size)
        )
        leave_to_others(model, [cast(Stage, stage) for stage in self.stages])
        self.group: ProcessGroup = ranks.mesh(device.type).get_group("pipeline")
        self._schedules: dict[tuple[int, tuple[int, ...]], Any] = {}
        self.precision: Precision | None = None

    def forward(self, batch: Batch) -> LossSum:
        """The objective on one batch, without gradients; on ranks that do not hold the last stage the sums
        are 0. A collective call.
        """
        import torch.distributed as dist

        assert self.precision is not None
        x, shape = batch.input_ids, (*batch.input_ids.shape, self.width)
        total, tokens = (
            torch.zeros((), device=self.device),
            torch.zeros((), dtype=torch.int64, device=self.device),
        )
        for number in range(self.count):
            if number % self.size != self.place:
                continue
            stage = cast(Stage, self.stages[number // self.size])
            stage.begin_step(self.precision, None)
            if not stage.is_first and self.size > 1:
                x = torch.empty(shape, device=self.device)
                dist.recv(x, group=self.group, group_src=(number - 1) % self.size)
            x = stage(x, batch.document_ids)
            if not stage.is_last and self.size > 1:
                dist.send(x.float().contiguous(), group=self.group, group_dst=(number + 1) % self.size)
            elif stage.is_last:
                with self.precision.autocast():
                    total, tokens = self.objective.of_hidden(stage.window, x, batch.labels)
        return LossSum(total, tokens)

    def forward_backward(
        self, batches: Sequence[Batch], tokens: int, precision: Precision, seeds: tuple[int, int, int] | None
    ) -> Tensor:
        """Add this step's gradients; the mean loss over `tokens`, which is 0 where the last stage is not. A
        collective call.
        """
        losses: list[Tensor] = []

        def loss_of(hidden: Tensor, labels: Tensor) -> Tensor:
            window = cast(Stage, self.stages[-1]).window
            with precision.autocast():
                total = self.objective.of_hidden(window, hidden, labels).total / max(tokens, 1)
            losses.append(total.detach())
            return total if precision.scaler is None else precision.scaler.scale(total)

        for stage in self.stages:
            cast(Stage, stage).begin_step(precision, seeds)
        ids, labels = (
            torch.cat([getattr(batch.to(self.device), name) for batch in batches])
            for name in ("input_ids", "labels")
        )
        documents = [batch.document_ids for batch in batches]
        given = (
            {"document_ids": torch.cat([one.to(self.device) for one in documents if one is not None])}
            if documents[0] is not None
            else {}
        )
        schedule = self._schedule(len(batches), tuple(batches[0].input_ids.shape))
        schedule._loss_fn = loss_of
        first = (ids,) if self.place == 0 else ()
        schedule.step(
            *first,
            target=labels if any(stage.is_last for stage in self.stages) else None,
            return_outputs=False,
            **given,
        )
        return torch.stack(losses).sum() if losses else torch.zeros((), device=self.device)

    def _schedule(self, micro_batches: int, shape: tuple[int, ...]) -> Any:
        """torch's schedule for so many micro-batches of this shape (B, T)."""
        from torch.distributed.pipelining import (
            PipelineStage,
            Schedule1F1B,
            ScheduleGPipe,
            ScheduleInterleaved1F1B,
        )

        if (micro_batches, shape) not in self._schedules:
            hidden = torch.empty(*shape, self.width, device="meta", requires_grad=True)
            ids = torch.empty(shape, dtype=torch.int64, device="meta")
            staged = [
                PipelineStage(
                    stage,
                    stage.number,
                    self.count,
                    self.device,
                    ids if stage.is_first else hidden,
                    hidden,
                    group=self.group,
                )
                for stage in map(cast, [Stage] * len(self.stages), self.stages)
            ]
            kinds = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}
            given = staged if self.schedule == "interleaved" else staged[0]
            made = kinds[self.schedule](
                given, micro_batches, loss_fn=lambda output, target: output.sum(), scale_grads=False
            )
            self._schedules[micro_batches, shape] = made
        return self._schedules[micro_batches, shape]


def leave_to_others(model: Transformer, own: Sequence[Stage]) -> None:
    """Put on the meta device what none of these stages runs."""
    held = {id(block) for stage in own for block in stage.window.blocks}
    for block in model.blocks:
        if id(block) not in held:
            _to_meta(block)
    is_first, is_last = any(stage.is_first for stage in own), any(stage.is_last for stage in own)
    is_tied = model.lm_head.weight is model.wte.weight
    ends = (
        (model.wte, is_first or (is_tied and is_last)),
        (model.wpe, is_first),
        (model.ln_f, is_last),
        (model.lm_head, is_last),
    )
    for module, is_needed in ends:
        if module is not None and not (is_needed or (is_tied and module is model.lm_head)):
            _to_meta(module)
    if is_tied:
        model.lm_head.weight = cast(nn.Parameter, model.wte.weight)


def _to_meta(module: nn.Module) -> None:
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                part._parameters[name] = nn.Parameter(
                    torch.empty_like(parameter, device="meta"), parameter.requires_grad
                )
