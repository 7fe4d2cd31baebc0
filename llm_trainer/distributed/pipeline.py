"""Pipeline parallelism: layers are split into stages on different ranks, which micro-batches pass through.

The schedules are torch's (GPipe, Huang et al. 2019, arXiv:1811.06965; 1F1B, Narayanan et al. 2019;
interleaved, Narayanan et al. 2021, arXiv:2104.04473), and their micro-batches are those of a step. A stage
is a shallow copy of the model: the same modules under the same names, but with the stage's own blocks only.
What other stages hold is on the meta device, so that it keeps its names and shapes and takes no memory. If
the embedding is tied to the head, it is on the first and the last stage, and its gradients are summed over
the two.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from llm_trainer.config import UsageError
from llm_trainer.config.resolve.parallelism import stages_of
from llm_trainer.data.sampling.batch import Batch
from llm_trainer.distributed.dropout_seed import seed_dropout
from llm_trainer.distributed.process_group import ProcessGroup
from llm_trainer.model.transformer import Transformer

if TYPE_CHECKING:
    import torch.distributed as dist

NOTHING_TRAINABLE = (
    "a pipeline stage has no trainable parameters, because all of its layers are frozen; "
    "set pipeline_parallel to fewer stages"
)


class HeadLoss(Protocol):
    """The loss of the last stage: a training objective that is a function of the final hidden states."""

    def from_hidden_states(self, model: Transformer, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of losses over supervised tokens and their number.

        Args:
            model: The model whose head is applied.
            hidden: Hidden states after the final norm, (B, T, C).
            labels: Target ids, (B, T).
        """


class StagePrecision(Protocol):
    """Device and arithmetic of the forward passes: `training.engines.precision.Precision`."""

    device: torch.device
    scaler: torch.amp.GradScaler | None

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context of a forward pass."""


class DropoutSeeds(NamedTuple):
    """What `seed_dropout` takes, but for the micro-batch."""

    seed: int
    step: int
    rank: int


def stage_bounds(num_layers: int, num_stages: int) -> list[tuple[int, int]]:
    """Return the first and last + 1 block of each stage.

    Stages are as equal as possible; the earlier ones, which do not have the head, get the extra blocks.
    """
    return [
        (-(-num_layers * stage // num_stages), -(-num_layers * (stage + 1) // num_stages))
        for stage in range(num_stages)
    ]


class ModelStage(nn.Module):
    """One stage of a pipeline: takes ids or hidden states and returns hidden states.

    Args:
        model: The full model.
        number: The stage, counted from 0.
        num_stages: The number of stages.
        blocks: The first and last + 1 block of the stage; by default those of `stage_bounds`.
    """

    def __init__(
        self, model: Transformer, number: int, num_stages: int, blocks: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.number, self.is_first, self.is_last = number, number == 0, number == num_stages - 1
        first, last = blocks or stage_bounds(model.config.num_hidden_layers, num_stages)[number]
        self.submodel = copy.copy(model)
        self.submodel._modules = dict(model._modules)
        self.submodel.blocks = nn.ModuleList(model.blocks[first:last])
        if not self.is_first:
            self.submodel.embed = lambda hidden, *positions: hidden  # type: ignore[method-assign]
        if not self.is_last:
            self.submodel.ln_f = nn.Identity()
        self.precision: StagePrecision | None = None
        self.dropout_seeds: DropoutSeeds | None = None
        self._num_passes = 0

    def forward(self, x: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Run the stage's blocks.

        Args:
            x: Ids (B, T) on the first stage, hidden states (B, T, C) on the others.
            document_ids: (B, T), for packed rows.

        Returns:
            Hidden states (B, T, C).
        """
        assert self.precision is not None
        if self.dropout_seeds is not None and self.training:
            seed, step, rank = self.dropout_seeds
            seed_dropout(seed, step, self._num_passes, rank, self.precision.device)
        self._num_passes += 1
        with self.precision.autocast():
            return self.submodel.hidden_states(x, document_ids=document_ids)

    def begin_step(self, precision: StagePrecision, dropout_seeds: DropoutSeeds | None) -> None:
        """Prepare for the first micro-batch of a step; without seeds dropout is not seeded."""
        self.precision, self.dropout_seeds, self._num_passes = precision, dropout_seeds, 0


class Pipeline(nn.Module):
    """This rank's stages of a model; the rest of the model is moved to the meta device.

    Args:
        model: The full model.
        objective: The loss on the last stage.
        process_group: The ranks and their plan.
        schedule: "gpipe", "1f1b" or "interleaved".
        device: Where the stages run.

    Raises:
        UsageError: The model cannot be split into stages.
    """

    def __init__(
        self,
        model: Transformer,
        objective: HeadLoss,
        process_group: ProcessGroup,
        schedule: str,
        device: torch.device,
    ) -> None:
        super().__init__()
        plan = process_group.plan
        self.objective = objective
        self.schedule, self.device, self.hidden_size = schedule, device, model.config.hidden_size
        self.num_stages = stages_of(schedule, plan.pipeline_parallel)
        if model.config.has_adapters:
            raise UsageError(
                "adapters are not supported with pipeline_parallel, which puts the ends of the model "
                "on different ranks; use fsdp instead"
            )
        self.pipeline_rank = plan.stage(process_group.rank)
        self.num_ranks = plan.pipeline_parallel
        self.stages = nn.ModuleList(
            ModelStage(model, number, self.num_stages)
            for number in range(self.pipeline_rank, self.num_stages, self.num_ranks)
        )
        drop_other_stages(model, [cast(ModelStage, stage) for stage in self.stages])
        self.group: dist.ProcessGroup = process_group.mesh(device.type).get_group("pipeline")
        self._schedules: dict[tuple[int, tuple[int, ...]], Any] = {}
        self.precision: StagePrecision | None = None

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Evaluate one batch without gradients. A collective call.

        Returns:
            The sum of losses and the number of supervised tokens; 0 on ranks without the last stage.
        """
        import torch.distributed as dist

        assert self.precision is not None
        x, shape = batch.input_ids, (*batch.input_ids.shape, self.hidden_size)
        total, tokens = (
            torch.zeros((), device=self.device),
            torch.zeros((), dtype=torch.int64, device=self.device),
        )
        for number in range(self.num_stages):
            if number % self.num_ranks != self.pipeline_rank:
                continue
            stage = cast(ModelStage, self.stages[number // self.num_ranks])
            stage.begin_step(self.precision, None)
            if not stage.is_first and self.num_ranks > 1:
                x = torch.empty(shape, device=self.device)
                dist.recv(x, group=self.group, group_src=(number - 1) % self.num_ranks)
            x = stage(x, batch.document_ids)
            if not stage.is_last and self.num_ranks > 1:
                dist.send(x.float().contiguous(), group=self.group, group_dst=(number + 1) % self.num_ranks)
            elif stage.is_last:
                with self.precision.autocast():
                    total, tokens = self.objective.from_hidden_states(stage.submodel, x, batch.labels)
        return total, tokens

    def forward_backward(
        self,
        batches: Sequence[Batch],
        tokens: int,
        precision: StagePrecision,
        dropout_seeds: DropoutSeeds | None,
    ) -> Tensor:
        """Run a step's micro-batches through the schedule and accumulate gradients. A collective call.

        Args:
            batches: The micro-batches.
            tokens: The supervised tokens of the step over all ranks, by which the loss is divided.
            precision: Device and arithmetic.
            dropout_seeds: None for a model without dropout.

        Returns:
            The mean loss, a scalar; 0 on ranks without the last stage.
        """
        losses: list[Tensor] = []

        def loss_of(hidden: Tensor, labels: Tensor) -> Tensor:
            submodel = cast(ModelStage, self.stages[-1]).submodel
            with precision.autocast():
                loss_sum, _ = self.objective.from_hidden_states(submodel, hidden, labels)
                mean = loss_sum / max(tokens, 1)
            losses.append(mean.detach())
            return mean if precision.scaler is None else precision.scaler.scale(mean)

        for stage in self.stages:
            cast(ModelStage, stage).begin_step(precision, dropout_seeds)
        ids, labels = (
            torch.cat([getattr(batch.to(self.device), name) for batch in batches])
            for name in ("input_ids", "labels")
        )
        documents = [batch.document_ids for batch in batches]
        kwargs = (
            {"document_ids": torch.cat([one.to(self.device) for one in documents if one is not None])}
            if documents[0] is not None
            else {}
        )
        schedule = self._schedule(len(batches), tuple(batches[0].input_ids.shape))
        schedule._loss_fn = loss_of
        inputs = (ids,) if self.pipeline_rank == 0 else ()
        schedule.step(
            *inputs,
            target=labels if any(stage.is_last for stage in self.stages) else None,
            return_outputs=False,
            **kwargs,
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
            hidden = torch.empty(*shape, self.hidden_size, device="meta", requires_grad=True)
            ids = torch.empty(shape, dtype=torch.int64, device="meta")
            stages = [
                PipelineStage(
                    stage,
                    stage.number,
                    self.num_stages,
                    self.device,
                    ids if stage.is_first else hidden,
                    hidden,
                    group=self.group,
                )
                for stage in map(cast, [ModelStage] * len(self.stages), self.stages)
            ]
            kinds = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}
            own = stages if self.schedule == "interleaved" else stages[0]
            self._schedules[micro_batches, shape] = kinds[self.schedule](
                own, micro_batches, loss_fn=lambda output, target: output.sum(), scale_grads=False
            )
        return self._schedules[micro_batches, shape]


def drop_other_stages(model: Transformer, own: Sequence[ModelStage]) -> None:
    """Move to the meta device what none of these stages runs."""
    kept = {id(block) for stage in own for block in stage.submodel.blocks}
    for block in model.blocks:
        if id(block) not in kept:
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
    for submodule in module.modules():
        for name, parameter in list(submodule._parameters.items()):
            if parameter is not None:
                submodule._parameters[name] = nn.Parameter(
                    torch.empty_like(parameter, device="meta"), parameter.requires_grad
                )
