"""The engine of a pipeline: the plan's stages around the same optimizers, clipping and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn, cast

from torch import Tensor, nn

from llm_trainer.config import UsageError
from llm_trainer.config.resolve.parallelism import check_depth, check_shape
from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.data.sampling.samplers import Batch
from llm_trainer.distributed.parallelize import (
    Shared,
    is_elsewhere,
    is_fully_sharded,
    shard_fully,
    sum_shared,
)
from llm_trainer.distributed.pipeline import NOTHING_TRAINED, Pipeline
from llm_trainer.distributed.tensor_parallel import cut_matrices, gradients_in_parts
from llm_trainer.model.surgery.model_state import Form
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.engines.autotune import Choice
from llm_trainer.training.engines.engine import Engine, StepResult, has_dropout
from llm_trainer.training.engines.train_step import update
from llm_trainer.training.engines.tuning import unmeasured_choice
from llm_trainer.training.objectives.objective import NextToken, Objective
from llm_trainer.training.optim.optimizers import build_optimizers, peak_rates, set_rates


class PipelineEngine(Engine):
    """Trains `model` by stages, each of which may be cut by tensor groups, shards and replicas. The rest of
    the model is elsewhere.
    """

    def _take(self, model: Transformer, objective: Objective, resting: Iterable[str] = ()) -> None:
        plan, kind = self.ranks.plan, self.device.type
        check_shape(plan, model.config)
        check_depth(plan.pipeline_parallel, self.training.pipeline_schedule, model.config.num_hidden_layers)
        self.model = model.to(self.device)
        mesh = self.ranks.mesh(kind)
        if plan.tensor_parallel > 1:
            cut_matrices(model, mesh["tensor"])
        self._pipeline = Pipeline(
            model, _next_token(objective), self.ranks, self.training.pipeline_schedule, self.device
        )
        if is_fully_sharded(plan):
            for stage in self._pipeline.stages:
                shard_fully(stage.window.blocks, stage, mesh["replicate", "shard"])  # type: ignore[union-attr,arg-type]
        self._shared = self._shared_parameters()
        own = [
            parameter
            for parameter in model.parameters()
            if parameter.requires_grad and not is_elsewhere(parameter)
        ]
        others = [
            parameter
            for parameter in model.parameters()
            if parameter.requires_grad and is_elsewhere(parameter)
        ]
        if not own:
            raise UsageError(NOTHING_TRAINED)
        for parameter in others:
            parameter.requires_grad_(False)
        self.optimizers = build_optimizers(model, self.training)
        for parameter in others:
            parameter.requires_grad_(True)
        is_twin = (
            plan.pipeline_parallel > 1
            and self._pipeline.place == plan.pipeline_parallel - 1
            and self._is_tied
        )
        self._parameters = own
        self._counted = [
            one for one in own if not (is_twin and one is model.wte.weight)
        ]  # the first stage counts the embedding
        self._peaks = peak_rates(self.optimizers)
        self.dropout_seed = self.training.seed if has_dropout(model) else None

    @property
    def _is_tied(self) -> bool:
        return self.model.config.tie_word_embeddings

    def _shared_parameters(self) -> list[Shared]:
        import torch.distributed as dist

        plan, rank = self.ranks.plan, self.ranks.rank
        shared: list[Shared] = []
        if plan.tensor_parallel > 1:
            group = self.ranks.mesh(self.device.type).get_group("tensor")
            shared += [
                Shared(one, group) for _, one in gradients_in_parts(self.model) if not is_elsewhere(one)
            ]
        if self._is_tied:
            of_stage = plan.ranks // plan.pipeline_parallel
            for first in range(of_stage):
                ends = [first, first + plan.ranks - of_stage]
                group = dist.new_group(ends)  # every rank makes every group
                if rank in ends:
                    shared.append(Shared(cast(nn.Parameter, self.model.wte.weight), group))
        return shared

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        return self._pipeline.objective

    @objective.setter
    def objective(self, objective: Objective) -> None:
        self._pipeline.objective = _next_token(objective)

    def check_change(self, shape: ModelConfig) -> NoReturn:
        """Not of a pipeline: raises UsageError."""
        raise UsageError(
            "operations that change the model do not go with a pipeline; use fsdp or tensor_parallel with a schedule"
        )

    def check_search(self) -> NoReturn:
        """Not of a pipeline: raises UsageError."""
        raise UsageError(
            "micro_batch_size auto does not go with pipeline_parallel, whose stages cannot be tried alone; give a number"
        )

    def form(self) -> Form:
        """Not of a pipeline: raises UsageError."""
        self.check_change(self.model.config)

    def rebuild(self, form: Form) -> None:
        """Not of a pipeline: raises UsageError."""
        self.check_change(form.config)

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
        """As was said: a stage alone cannot be measured."""
        return unmeasured_choice(
            self.model, precision or self.training.precision, compiled, self.training, self.device
        )

    def _make_ready(self) -> None:
        pass

    def _step_of_validation(self) -> nn.Module:
        self._pipeline.precision = self.precision
        return self._pipeline

    def step(self, batches: Sequence[Batch], tokens: int, *, rate_factor: float, index: int) -> StepResult:
        """As `Engine.step`."""
        set_rates(self.optimizers, self._peaks, rate_factor)
        ranks, seeds = self.ranks, None
        if self.dropout_seed is not None:
            seeds = (
                self.dropout_seed,
                index,
                ranks.data_rank + ranks.data_count * (1 + self._pipeline.place),
            )
        with self.timings.of("forward"):  # and backward: they overlap
            loss = ranks.add_tensor(self._pipeline.forward_backward(batches, tokens, self.precision, seeds))
        sum_shared(self._shared)
        with self.timings.of("optimizer"):
            norm, skipped = update(
                self.optimizers, self._parameters, loss, tokens, self.precision, self.training.max_grad_norm,
                offload=self.training.offload_optimizer, norm_of=self._norm,
            )  # fmt: skip
        self.timings.step_done()
        return StepResult(loss, norm, skipped)

    def _norm(self, own: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
        """The gradient's norm over all stages."""
        import torch.distributed as dist

        squared = own(self._counted).square()
        dist.all_reduce(squared, group=self._pipeline.group)
        return squared.sqrt()


def _next_token(objective: Objective) -> NextToken:
    if not isinstance(objective, NextToken):
        raise UsageError(
            f"a pipeline trains on next tokens only, not on {type(objective).__name__}; leave pipeline_parallel out"
        )
    return objective
