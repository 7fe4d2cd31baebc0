"""How the ranks of a run share the work: settled from the settings and the launcher's count before anything
is built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llm_trainer.config.resolve.batch_size import BatchPlan
from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.config.schema.training import TrainingConfig
from llm_trainer.errors import UsageError

_STAGES_A_RANK = {"gpipe": 1, "1f1b": 1, "interleaved": 2}


@dataclass(frozen=True)
class ParallelPlan:
    """So many replicas of the model, each replica's state cut over `fsdp` ranks, which read samples of their own; each of these is a group
    of ranks that see the same samples: `pipeline_parallel` stages of layers, whose matrices are cut over `tensor_parallel` ranks, or
    `context_parallel` ranks that see a part of each sequence, and cut the replica's state further.

    Ranks are numbered with the tensor group innermost (it talks most), then those that share sequences, and
    stages outermost.
    """

    data_parallel: int = 1
    fsdp: int = 1
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    context_parallel: int = 1

    @property
    def ranks(self) -> int:
        """Processes that the plan takes."""
        return self.data_ranks * self.context_parallel * self.tensor_parallel * self.pipeline_parallel

    @property
    def data_ranks(self) -> int:
        """Groups of ranks that read samples of their own."""
        return self.data_parallel * self.fsdp

    @property
    def shards(self) -> int:
        """Ranks over which a replica's state (that of a stage, of a tensor group's part) is cut: ranks that
        share sequences hold no copies, since it is for want of memory that sequences are shared.
        """
        return self.fsdp * self.context_parallel

    def data_rank(self, rank: int) -> int:
        """Which of these groups a rank belongs to."""
        return self.token_rank(rank) // self.context_parallel

    def token_rank(self, rank: int) -> int:
        """Whose tokens a rank sees: a number for each part of a sequence of each group. A tensor group and
        its stages see the same.
        """
        return rank // self.tensor_parallel % (self.data_ranks * self.context_parallel)

    def context_rank(self, rank: int) -> int:
        """Which part of its sequences a rank sees."""
        return rank // self.tensor_parallel % self.context_parallel

    def stage(self, rank: int) -> int:
        """Which stage of the pipeline a rank runs."""
        return rank // (self.tensor_parallel * self.context_parallel * self.data_ranks)

    def owns_loss(self, rank: int) -> bool:
        """Whether a rank tells sums over its tokens: the first of its tensor group, in the last stage, which
        knows the loss.
        """
        return rank % self.tensor_parallel == 0 and self.stage(rank) == self.pipeline_parallel - 1

    def __str__(self) -> str:
        others = [(name, size) for name, size in _others(self) if size > 1]
        return " × ".join(f"{name} {size}" for name, size in [("data_parallel", self.data_parallel), *others])


def _others(plan: ParallelPlan | TrainingConfig) -> list[tuple[str, int]]:
    return [
        (name, getattr(plan, name))
        for name in ("fsdp", "tensor_parallel", "pipeline_parallel", "context_parallel")
    ]


def planned_ranks(training: TrainingConfig) -> int:
    """The processes that the settings make where they say all of it; what is not said of data_parallel is 1."""
    return math.prod(size for _, size in _others(training)) * (training.data_parallel or 1)


def resolve_plan(training: TrainingConfig, ranks: int) -> ParallelPlan:
    """The plan for so many ranks; what is not said of data_parallel is what the others leave. Raises
    UsageError for a wrong product.
    """
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
    tensor, stages, parts = plan.tensor_parallel, plan.pipeline_parallel, plan.context_parallel
    _check_cut(tensor, model)
    if stages > model.num_hidden_layers:
        raise UsageError(
            f"pipeline_parallel {stages} is more stages than the model has layers ({model.num_hidden_layers}); take fewer stages"
        )
    if stages > 1 and parts > 1:
        raise UsageError(
            f"context_parallel {parts} and pipeline_parallel {stages} do not go together: stages do not hand on parts of sequences; "
            "keep one, with fsdp or tensor_parallel"
        )
    if parts > 1 and model.max_position_embeddings % (2 * parts):
        raise UsageError(
            f"context_parallel {parts} takes two pieces of each sequence a rank, and {2 * parts} does not divide the context of "
            f"{model.max_position_embeddings} tokens; take a context (max_position_embeddings) that it divides"
        )


def stages_of(schedule: str, ranks: int) -> int:
    """How many stages a schedule makes of so many ranks."""
    return _STAGES_A_RANK[schedule] * ranks


def check_stages(ranks: int, schedule: str, layers: int, micro_batches: int) -> None:
    """Raises UsageError where a pipeline's schedule cannot cut so many layers, or cannot run a step of so
    many micro-batches.
    """
    check_depth(ranks, schedule, layers)
    check_rounds(ranks, schedule, micro_batches)


def check_depth(ranks: int, schedule: str, layers: int) -> None:
    """Raises UsageError where a pipeline's schedule cannot cut so many layers."""
    stages = stages_of(schedule, ranks)
    if ranks > 1 and layers < stages:
        raise UsageError(
            f"pipeline_schedule {schedule} makes {stages} stages of {ranks} ranks, but the model has {layers} layers; "
            "take another schedule or fewer ranks"
        )


def check_rounds(ranks: int, schedule: str, micro_batches: int) -> None:
    """Raises UsageError where a pipeline's schedule cannot run a step of so many micro-batches."""
    rounds = max(1, micro_batches // ranks)
    if ranks > 1 and schedule == "interleaved" and micro_batches % rounds:
        raise UsageError(
            f"pipeline_schedule interleaved sends a step's micro-batches in {rounds} equal rounds through {ranks} ranks, which "
            f"{micro_batches} micro-batches do not make; take {micro_batches // ranks * ranks} or {-(-micro_batches // ranks) * ranks} "
            "(batch_size, gradient_accumulation_steps), or pipeline_schedule 1f1b"
        )


def _check_cut(tensor: int, model: ModelConfig) -> None:
    """Raises UsageError for blocks whose matrices so many ranks cannot cut."""
    for block in map(model.block_config, range(model.num_hidden_layers)):
        widths = {"num_attention_heads": block.num_attention_heads, "num_key_value_heads": block.kv_heads}
        for name, width in {**widths, "intermediate_size": block.mlp_width}.items():
            if width % tensor:
                raise UsageError(
                    f"tensor_parallel {tensor} does not divide {name} {width}; take one that divides the heads, the key-value heads "
                    "and the MLP"
                )
    adapted = [
        target
        for table in model.with_lora_tables().lora.values()
        for target, rank in table.ranks.items()
        if rank
    ]
    in_blocks = next((target for target in adapted if target.startswith(("attn.", "mlp."))), None)
    if tensor > 1 and in_blocks is not None:
        raise UsageError(
            f"tensor_parallel cannot cut {in_blocks}, which has a low-rank adapter; use fsdp with it"
        )


def check_precision(plan: ParallelPlan, precision: str) -> None:
    """Raises UsageError for an arithmetic in which ranks of this plan cannot train.

    fp16's scaler looks at the gradients of one rank, of one kind: stages hold others each, and a tensor group
    whole ones beside parts.
    """
    for name in ("tensor_parallel", "pipeline_parallel"):
        if precision == "fp16" and getattr(plan, name) > 1:
            raise UsageError(
                f"precision fp16 does not go with {name} {getattr(plan, name)}, whose ranks would have to scale gradients alike; use bf16 "
                "(or fp32), or fsdp with fp16"
            )


def check_plan(plan: ParallelPlan, batches: BatchPlan, training: TrainingConfig, model: ModelConfig) -> None:
    """Check everything about the ranks that can be wrong before there is a model.

    A shape that comes with weights is not known here; the engine checks it as soon as it is.

    Args:
        plan: Sizes of the parallel dimensions.
        batches: Micro-batch size and accumulation per rank.
        training: The settings.
        model: The shape.

    Raises:
        UsageError: If the ranks cannot train this model with these settings.
    """
    check_precision(plan, training.precision)
    if training.init_from == "scratch" and training.resume_from is None:
        check_shape(plan, model)
        check_depth(plan.pipeline_parallel, training.pipeline_schedule, model.num_hidden_layers)
    check_rounds(plan.pipeline_parallel, training.pipeline_schedule, batches.gradient_accumulation_steps)
    if training.quantize_base != "off" and (plan.ranks > 1 or training.use_deepspeed):
        what = f"{plan.ranks} ranks" if plan.ranks > 1 else "use_deepspeed"
        raise UsageError(
            f"quantize_base {training.quantize_base} does not go with {what}; train on one rank, or leave it off"
        )


def _started(count: int) -> str:
    return f"{count} process{'es were' if count > 1 else ' was'} started"
