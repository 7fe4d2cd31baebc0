"""How the ranks of a run share the work: settled from the settings and the launcher's count before anything is built."""

from __future__ import annotations

from dataclasses import dataclass

from llm_trainer.config.batches import resolve_batches
from llm_trainer.config.errors import UsageError
from llm_trainer.config.model import ModelConfig
from llm_trainer.config.training import TrainingConfig


@dataclass(frozen=True)
class ParallelPlan:
    """So many replicas of the model, each replica's state cut over `fsdp` ranks, which read samples of their own; each of these is a group
    of ranks that see the same samples: `pipeline_parallel` stages of layers, whose matrices are cut over `tensor_parallel` ranks.

    Ranks are numbered with the tensor group innermost (it talks most) and stages outermost.
    """

    data_parallel: int = 1
    fsdp: int = 1
    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    @property
    def ranks(self) -> int:
        """Processes that the plan takes."""
        return self.data_ranks * self.tensor_parallel * self.pipeline_parallel

    @property
    def data_ranks(self) -> int:
        """Groups of ranks that read samples of their own."""
        return self.data_parallel * self.fsdp

    def data_rank(self, rank: int) -> int:
        """Which of these groups a rank belongs to."""
        return rank // self.tensor_parallel % self.data_ranks

    def stage(self, rank: int) -> int:
        """Which stage of the pipeline a rank runs."""
        return rank // (self.tensor_parallel * self.data_ranks)

    def speaks(self, rank: int) -> bool:
        """Whether a rank tells its group's sums: the first of its tensor group, in the last stage, which knows the loss."""
        return rank % self.tensor_parallel == 0 and self.stage(rank) == self.pipeline_parallel - 1

    def __str__(self) -> str:
        others = [(name, size) for name, size in _others(self) if size > 1]
        return " × ".join(f"{name} {size}" for name, size in [("data_parallel", self.data_parallel), *others])


def _others(plan: ParallelPlan | TrainingConfig) -> list[tuple[str, int]]:
    return [("fsdp", plan.fsdp), ("tensor_parallel", plan.tensor_parallel), ("pipeline_parallel", plan.pipeline_parallel)]


def resolve_plan(training: TrainingConfig, ranks: int) -> ParallelPlan:
    """The plan for so many ranks; what is not said of data_parallel is what the others leave. Raises UsageError for a wrong product."""
    others = _others(training)
    taken, replicas = 1, training.data_parallel
    for _, size in others:
        taken *= size
    product = " × ".join(f"{name} {size}" for name, size in others if size > 1) or "fsdp 1"
    if replicas is None:
        if ranks % taken:
            many = f" = {taken}" if product.count("×") else ""
            raise UsageError(
                f"{product}{many} does not fit: {_started(ranks)}, which {taken} does not divide; take a divisor of {ranks}, "
                f"or start a multiple of {taken}"
            )
        replicas = ranks // taken
    if replicas * taken != ranks:
        raise UsageError(
            f"data_parallel {replicas} × {product} = {replicas * taken}, but {_started(ranks)}; "
            f"start {replicas * taken} (torchrun --nproc_per_node), or leave data_parallel out"
        )
    return ParallelPlan(replicas, *(size for _, size in others))


def check_shape(plan: ParallelPlan, model: ModelConfig) -> None:
    """Raises UsageError for a model that the plan cannot cut, naming what does not divide."""
    tensor, stages = plan.tensor_parallel, plan.pipeline_parallel
    widths = {"num_attention_heads": model.num_attention_heads, "num_key_value_heads": model.kv_heads, "intermediate_size": model.mlp_width}
    for name, width in widths.items():
        if width % tensor:
            raise UsageError(
                f"tensor_parallel {tensor} does not divide {name} {width}; take one that divides the heads, the key-value heads and the MLP"
            )
    if stages > model.num_hidden_layers:
        raise UsageError(
            f"pipeline_parallel {stages} is more stages than the model has layers ({model.num_hidden_layers}); take fewer stages"
        )


def check_plan(training: TrainingConfig, model: ModelConfig, ranks: int) -> None:
    """Everything about the ranks that can be wrong before a model is there. Raises UsageError."""
    plan = resolve_plan(training, ranks)
    resolve_batches(training, plan.data_ranks)
    check_shape(plan, model)


def _started(count: int) -> str:
    return f"{count} process{'es were' if count > 1 else ' was'} started"
