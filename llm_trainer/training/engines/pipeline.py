"""The engine of a pipeline: stages on different ranks, with the same optimizers, clipping and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn, cast

from torch import Tensor, nn

from llm_trainer.config import UsageError
from llm_trainer.config.resolve.parallelism import check_depth, check_shape
from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.data.sampling.batch import Batch
from llm_trainer.distributed.parallelize import (
    PartialGradient,
    all_reduce_partial_gradients,
    apply_fsdp,
    is_on_other_stage,
    uses_fsdp,
)
from llm_trainer.distributed.pipeline import NOTHING_TRAINABLE, DropoutSeeds, Pipeline
from llm_trainer.distributed.tensor_parallel import apply_tensor_parallel, partial_gradient_parameters
from llm_trainer.model.surgery.model_state import ModelState
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.engines.autotune import TuneResult, WorkLeft
from llm_trainer.training.engines.engine import Engine, StepResult, has_dropout
from llm_trainer.training.engines.train_step import update
from llm_trainer.training.objectives.objective import NextToken, Objective
from llm_trainer.training.optim.optimizers import build_optimizers, peak_lrs, set_lrs


class PipelineEngine(Engine):
    """Trains a model in stages. Each stage may be sharded, replicated and split over tensor groups.

    The parameters of stages on other ranks are not in memory here.
    """

    def _set_model(
        self, model: Transformer, objective: Objective, frozen_with_state: Iterable[str] = ()
    ) -> None:
        plan, kind = self.process_group.plan, self.device.type
        check_shape(plan, model.config)
        check_depth(plan.pipeline_parallel, self.training.pipeline_schedule, model.config.num_hidden_layers)
        self.model = model.to(self.device)
        mesh = self.process_group.mesh(kind)
        if plan.tensor_parallel > 1:
            apply_tensor_parallel(model, mesh["tensor"])
        self._pipeline = Pipeline(
            model, _next_token(objective), self.process_group, self.training.pipeline_schedule, self.device
        )
        if uses_fsdp(plan):
            for stage in self._pipeline.stages:
                apply_fsdp(stage.submodel.blocks, stage, mesh["replicate", "shard"])  # type: ignore[union-attr,arg-type]
        self._shared = self._partial_gradients()
        own = [
            parameter
            for parameter in model.parameters()
            if parameter.requires_grad and not is_on_other_stage(parameter)
        ]
        others = [
            parameter
            for parameter in model.parameters()
            if parameter.requires_grad and is_on_other_stage(parameter)
        ]
        if not own:
            raise UsageError(NOTHING_TRAINABLE)
        for parameter in others:
            parameter.requires_grad_(False)
        self.optimizers = build_optimizers(model, self.training)
        for parameter in others:
            parameter.requires_grad_(True)
        self._parameters = own
        # A tied embedding is on the first and the last stage; only the first adds it to the norm.
        has_copy = (
            plan.pipeline_parallel > 1
            and self._pipeline.pipeline_rank == plan.pipeline_parallel - 1
            and self._is_tied
        )
        self._in_norm = [one for one in own if not (has_copy and one is model.wte.weight)]
        self._peaks = peak_lrs(self.optimizers)
        self.dropout_seed = self.training.seed if has_dropout(model) else None

    @property
    def _is_tied(self) -> bool:
        return self.model.config.tie_word_embeddings

    def _partial_gradients(self) -> list[PartialGradient]:
        """Parameters that several ranks hold and of which each has only a part of the gradient."""
        import torch.distributed as dist

        plan, rank = self.process_group.plan, self.process_group.rank
        shared: list[PartialGradient] = []
        if plan.tensor_parallel > 1:
            group = self.process_group.mesh(self.device.type).get_group("tensor")
            shared += [
                PartialGradient(one, group)
                for _, one in partial_gradient_parameters(self.model)
                if not is_on_other_stage(one)
            ]
        if self._is_tied:
            stage_ranks = plan.ranks // plan.pipeline_parallel
            for first in range(stage_ranks):
                ends = [first, first + plan.ranks - stage_ranks]
                group = dist.new_group(ends)  # every rank has to create every group
                if rank in ends:
                    shared.append(PartialGradient(cast(nn.Parameter, self.model.wte.weight), group))
        return shared

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        return cast(Objective, self._pipeline.objective)

    @objective.setter
    def objective(self, objective: Objective) -> None:
        self._pipeline.objective = _next_token(objective)

    def check_change(self, shape: ModelConfig) -> NoReturn:
        """Operations cannot change the model of a pipeline.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            "operations that change the model are not supported with pipeline_parallel; use fsdp or "
            "tensor_parallel instead, or remove those operations from the schedule"
        )

    def check_search(self) -> NoReturn:
        """A micro-batch size cannot be searched for, because a stage cannot run alone.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            "micro_batch_size auto is not supported with pipeline_parallel, because a stage cannot be tried "
            "alone; set micro_batch_size to a number"
        )

    def model_state(self) -> ModelState:
        """Not supported for a pipeline.

        Raises:
            UsageError: Always.
        """
        self.check_change(self.model.config)

    def rebuild(self, state: ModelState) -> None:
        """Not supported for a pipeline.

        Raises:
            UsageError: Always.
        """
        self.check_change(state.config)

    def tune(
        self,
        batch: Callable[[], Batch],
        work: WorkLeft,
        *,
        precision: str | None = None,
        compiled: str | None = None,
        cache_dir: Path | None = None,
    ) -> TuneResult:
        """As `Engine.tune`, but nothing is tried, because a stage cannot run alone."""
        return self._tune_untried(work, precision, compiled)

    def _wrap(self) -> None:
        pass

    def _validation_step(self) -> nn.Module:
        self._pipeline.precision = self.precision
        return self._pipeline

    def step(self, batches: Sequence[Batch], tokens: int, *, lr_factor: float, index: int) -> StepResult:
        """As `Engine.step`."""
        set_lrs(self.optimizers, self._peaks, lr_factor)
        process_group, seeds = self.process_group, None
        if self.dropout_seed is not None:
            seeds = DropoutSeeds(
                self.dropout_seed,
                index,
                process_group.data_rank + process_group.data_world_size * (1 + self._pipeline.pipeline_rank),
            )
        with self.timings.measure("forward"):  # and backward: they overlap
            loss = process_group.all_reduce_tensor(
                self._pipeline.forward_backward(batches, tokens, self.precision, seeds)
            )
        all_reduce_partial_gradients(self._shared)
        with self.timings.measure("optimizer"):
            norm, skipped = update(
                self.optimizers, self._parameters, loss, tokens, self.precision, self.training.max_grad_norm,
                offload=self.training.offload_optimizer, norm_of=self._norm,
            )  # fmt: skip
        self.timings.step_done()
        return StepResult(loss, norm, skipped)

    def _norm(self, norm_of: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
        """The norm of the gradients of all stages."""
        import torch.distributed as dist

        squared = norm_of(self._in_norm).square()
        dist.all_reduce(squared, group=self._pipeline.group)
        return squared.sqrt()


def _next_token(objective: Objective) -> NextToken:
    if not isinstance(objective, NextToken):
        raise UsageError(
            f"pipeline_parallel supports next-token training only, not {type(objective).__name__}; remove "
            "pipeline_parallel"
        )
    return objective
