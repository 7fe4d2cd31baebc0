"""Sizes of the parallel dimensions, resolved from the settings and the launcher's number of ranks before the
model is built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llm_trainer.config.resolve.batch_size import BatchPlan
from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.config.schema.training import TrainingConfig
from llm_trainer.errors import UsageError

_STAGES_PER_RANK = {"gpipe": 1, "1f1b": 1, "interleaved": 2}


@dataclass(frozen=True)
class ParallelPlan:
    """Sizes of the data, FSDP, tensor, pipeline and context dimensions.

    The ranks of the data and FSDP dimensions read different samples; those of the other three read the same
    ones. FSDP and context ranks shard the state of a replica. The tensor dimension is the innermost in the
    numbering of ranks, because it communicates most; then come context, FSDP and data, and the pipeline is
    the outermost.
    """

    data_parallel: int = 1
    fsdp: int = 1
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    context_parallel: int = 1

    @property
    def ranks(self) -> int:
        """Number of ranks in the plan."""
        return self.data_ranks * self.context_parallel * self.tensor_parallel * self.pipeline_parallel

    @property
    def data_ranks(self) -> int:
        """Number of groups of ranks that read different samples."""
        return self.data_parallel * self.fsdp

    @property
    def shards(self) -> int:
        """Number of ranks over which the state of a replica is sharded (within a stage and a tensor rank).
        Context ranks hold no copies of it, since sequences are sharded where memory is short.
        """
        return self.fsdp * self.context_parallel

    def data_rank(self, rank: int) -> int:
        """Index of the group of ranks that read the same samples as this rank."""
        return self.token_rank(rank) // self.context_parallel

    def token_rank(self, rank: int) -> int:
        """Index of the tokens that a rank processes. Tensor ranks and pipeline stages process the same
        tokens; context ranks process different parts of the same sequences.
        """
        return rank // self.tensor_parallel % (self.data_ranks * self.context_parallel)

    def context_rank(self, rank: int) -> int:
        """Index of a rank in its context group."""
        return rank // self.tensor_parallel % self.context_parallel

    def stage(self, rank: int) -> int:
        """Index of the pipeline stage that a rank runs."""
        return rank // (self.tensor_parallel * self.context_parallel * self.data_ranks)

    def owns_loss(self, rank: int) -> bool:
        """Whether a rank contributes its tokens to sums over all tokens, such as the loss: the first of its
        tensor group, in the last stage.
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
    """Number of ranks that the settings ask for. Unset data_parallel counts as 1."""
    return math.prod(size for _, size in _others(training)) * (training.data_parallel or 1)


def resolve_plan(training: TrainingConfig, ranks: int) -> ParallelPlan:
    """Resolve the parallel dimensions.

    Args:
        training: The settings. Unset data_parallel becomes what the other dimensions leave.
        ranks: Number of ranks that the launcher started.

    Raises:
        UsageError: The product of the sizes is not the number of ranks.
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
                f"{product}{many} does not fit: {_started(ranks)}, which is not a multiple of {taken}; start "
                f"{taken} or a multiple (torchrun --nproc_per_node={taken})"
                + (f", or use a divisor of {ranks}" if ranks > 1 else "")
            )
        replicas = ranks // taken
    if replicas * taken != ranks:
        raise UsageError(
            f"data_parallel {replicas} × {product} = {replicas * taken}, but {_started(ranks)}; "
            f"start {replicas * taken} (torchrun --nproc_per_node), or remove data_parallel"
        )
    return ParallelPlan(replicas, *(size for _, size in others))


def check_shape(plan: ParallelPlan, model: ModelConfig) -> None:
    """Raises UsageError for a model shape that the plan cannot shard; the message names the number."""
    tensor, stages, contexts = plan.tensor_parallel, plan.pipeline_parallel, plan.context_parallel
    _check_tensor_parallel(tensor, model)
    if stages > model.num_hidden_layers:
        raise UsageError(
            f"pipeline_parallel {stages} is more stages than the model has layers "
            f"({model.num_hidden_layers}); use fewer "
            "stages"
        )
    if stages > 1 and contexts > 1:
        raise UsageError(
            f"context_parallel {contexts} is not supported with pipeline_parallel {stages}, whose stages do "
            "not pass on sharded sequences; keep one of them, with fsdp or tensor_parallel"
        )
    if contexts > 1 and model.max_position_embeddings % (2 * contexts):
        raise UsageError(
            f"context_parallel {contexts} gives each rank two chunks of every sequence, but "
            "max_position_embeddings "
            f"{model.max_position_embeddings} is not a multiple of {2 * contexts}; change one of them"
        )


def stages_of(schedule: str, ranks: int) -> int:
    """Number of pipeline stages of a schedule on this many ranks."""
    return _STAGES_PER_RANK[schedule] * ranks


def check_stages(ranks: int, schedule: str, layers: int, micro_batches: int) -> None:
    """Check that a pipeline schedule can divide the layers and the micro-batches.

    Args:
        ranks: Ranks of the pipeline.
        schedule: Name of the schedule.
        layers: Layers of the model.
        micro_batches: Micro-batches per step.

    Raises:
        UsageError: It cannot.
    """
    check_depth(ranks, schedule, layers)
    check_rounds(ranks, schedule, micro_batches)


def check_depth(ranks: int, schedule: str, layers: int) -> None:
    """Raises UsageError where a pipeline schedule has more stages than the model has layers."""
    stages = stages_of(schedule, ranks)
    if ranks > 1 and layers < stages:
        raise UsageError(
            f"pipeline_schedule {schedule} makes {stages} stages on {ranks} ranks, but the model has "
            f"{layers} layers; "
            "use another schedule or fewer ranks"
        )


def check_rounds(ranks: int, schedule: str, micro_batches: int) -> None:
    """Raises UsageError where a pipeline schedule cannot run a step of this many micro-batches."""
    rounds = max(1, micro_batches // ranks)
    if ranks > 1 and schedule == "interleaved" and micro_batches % rounds:
        raise UsageError(
            f"pipeline_schedule interleaved runs the micro-batches of a step in {rounds} equal rounds on "
            f"{ranks} ranks, "
            f"but {micro_batches} micro-batches are not divisible by {rounds}; use "
            f"{micro_batches // ranks * ranks} or "
            f"{-(-micro_batches // ranks) * ranks} of them (batch_size, gradient_accumulation_steps), or "
            "pipeline_schedule 1f1b"
        )


def _check_tensor_parallel(tensor: int, model: ModelConfig) -> None:
    """Raises UsageError for blocks whose matrices cannot be sharded over this many tensor ranks."""
    for block in map(model.block_config, range(model.num_hidden_layers)):
        widths = {"num_attention_heads": block.num_attention_heads, "num_key_value_heads": block.kv_heads}
        for name, width in {**widths, "intermediate_size": block.mlp_width}.items():
            if width % tensor:
                raise UsageError(
                    f"{name} {width} is not divisible by tensor_parallel {tensor}; use a size that divides "
                    "the heads, the key-value heads and the MLP"
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
            f"tensor_parallel is not supported with LoRA in blocks ({in_blocks}); use fsdp instead"
        )


def check_precision(plan: ParallelPlan, precision: str) -> None:
    """Raises UsageError for a precision in which the ranks of this plan cannot train.

    The gradient scaler of fp16 decides by the gradients of one rank. Pipeline stages have different
    gradients, and tensor ranks have both sharded and unsharded ones, so that their decisions could differ.
    """
    for name in ("tensor_parallel", "pipeline_parallel"):
        if precision == "fp16" and getattr(plan, name) > 1:
            raise UsageError(
                f"precision fp16 is not supported with {name} {getattr(plan, name)}, whose ranks must scale "
                "gradients alike; use bf16 (or fp32), or fsdp with fp16"
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
            f"quantize_base {training.quantize_base} is not supported with {what}; train on one rank, or "
            "remove it"
        )


def _started(count: int) -> str:
    return f"{count} process{'es were' if count > 1 else ' was'} started"
