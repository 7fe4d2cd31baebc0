"""Will it fit? Estimates the memory of one rank under a parallel plan, what a step sends, and what to change.

The memory of a step comes from `training/memory/memory_estimator.py`, which runs the step on tensors without
contents. A plan then divides it:

- Tensor parallelism: each of t ranks has a model with 1/t of the heads and of the MLP's hidden units, which
  is a model configuration like any other. The residual stream, norms, embeddings and head are on each rank.
- FSDP: weights and optimizer state are sharded. The largest block is gathered twice, once while it is used
  and once while the next one arrives. Gradients are sharded if a step is one micro-batch. With accumulation
  they stay unsharded until the last micro-batch, which saves communication.
- Data parallelism: nothing is divided. The buckets of DistributedDataParallel are a second copy of the
  gradients.
- Pipeline parallelism: each stage has its own layers, and the first and last also the embeddings and the
  head, so ranks need different amounts (`training/memory/pipeline_memory.py`). The shards of a stage are
  gathered from the first micro-batch of a step to its last, and its gradients are unsharded until then.
- Context parallelism: a step runs on the rank's part of each sequence, with the keys and values of the others
  gathered. The model's state is sharded as by FSDP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llm_trainer.config import TrainingConfig, UsageError
from llm_trainer.config.param_count import params_per_module
from llm_trainer.config.resolve.batch_size import BatchPlan
from llm_trainer.config.resolve.parallelism import ParallelPlan, check_shape, check_stages, stages_of
from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.model.adapters.nf4 import bytes_saved
from llm_trainer.model.hf.checkpoint import empty_model
from llm_trainer.training.engines.precision import PrecisionName
from llm_trainer.training.memory.memory_estimator import StepMemory, step_memory
from llm_trainer.training.memory.pipeline_memory import (
    PipelineRankMemory,
    check_all_ranks_train,
    pipeline_rank_memories,
)
from llm_trainer.training.optim.param_groups import trainable_sizes

WEIGHT_BYTES = 4
_PIPELINE_SIZES = (1, 2, 4, 8, 16)
MEMORY_RESERVE_FRACTION = 0.1  # of a device's memory: for the library's context, communication, fragmentation


@dataclass(frozen=True)
class RankMemory:
    """The memory of one rank, in bytes.

    Attributes:
        weights: Weights.
        optimizer: Optimizer state on the device.
        gradients: Gradients at the peak of the step.
        activations: Activations and temporaries at that moment.
        loss_buffers: Buffers of the loss, for logits.
        gathered: Weights gathered by FSDP, or the buckets of DistributedDataParallel.
        kv_cache_per_sequence: Keys and values of one sequence of full length, when generating.
        checkpoint: A checkpoint on disk, over all ranks.
        on_host: Optimizer state in host memory, if it is offloaded.
        received: Buffers for what neighbouring pipeline stages send.
        saved_by_quantization: How much larger quantized weights would be as floats, as which they are saved.
    """

    weights: int
    optimizer: int
    gradients: int
    activations: int
    loss_buffers: int
    gathered: int
    kv_cache_per_sequence: int
    checkpoint: int
    on_host: int = 0
    received: int = 0
    saved_by_quantization: int = 0

    @property
    def total(self) -> int:
        """The peak of a training step on the device."""
        return (
            self.weights
            + self.optimizer
            + self.gradients
            + self.activations
            + self.loss_buffers
            + self.gathered
            + self.received
        )

    @property
    def async_save_copy(self) -> int:
        """The host memory that an asynchronous save takes: weights, as floats, and optimizer state."""
        return self.weights + self.saved_by_quantization + self.optimizer + self.on_host

    def parts(self) -> dict[str, int]:
        """Return what `total` consists of, by a label for display."""
        labelled = {
            "weights": self.weights,
            "gradients at the peak": self.gradients,
            "optimizer": self.optimizer,
            "activations and temporaries": self.activations,
            "loss buffers (logits)": self.loss_buffers,
            "gathered blocks and buckets": self.gathered,
            "buffers between stages": self.received,
        }
        return {label: size for label, size in labelled.items() if size or label.startswith("gradients")}


def tensor_parallel_config(config: ModelConfig, tensor_parallel: int) -> ModelConfig:
    """Return the configuration of what one rank of a tensor group has.

    Raises:
        UsageError: The number of heads or the hidden size of the MLP does not divide.
    """
    sizes = {"num_attention_heads": config.num_attention_heads, "MLP width": config.mlp_width}
    indivisible = [f"{name} {size}" for name, size in sizes.items() if size % tensor_parallel]
    if indivisible:
        raise UsageError(
            f"tensor_parallel {tensor_parallel} does not divide {' and '.join(indivisible)}; "
            "choose a divisor of them"
        )
    return config.model_copy(
        update={
            "head_dim": config.head_width,
            "num_attention_heads": config.num_attention_heads // tensor_parallel,
            "num_key_value_heads": max(1, config.kv_heads // tensor_parallel),
            "intermediate_size": config.mlp_width // tensor_parallel,
        }
    )


def rank_memory(
    config: ModelConfig,
    training: TrainingConfig,
    plan: ParallelPlan,
    batches: BatchPlan,
    precision: PrecisionName | None = None,
) -> RankMemory:
    """Return the memory of the rank that needs most; the arguments are those of `rank_memories`."""
    return max(rank_memories(config, training, plan, batches, precision), key=lambda memory: memory.total)


def rank_memories(
    config: ModelConfig,
    training: TrainingConfig,
    plan: ParallelPlan,
    batches: BatchPlan,
    precision: PrecisionName | None = None,
) -> list[RankMemory]:
    """Return the memory of one rank of each position in a pipeline, or of any rank without a pipeline.

    Args:
        config: The model.
        training: The settings; `training.offload_optimizer` moves the optimizer state to the host.
        plan: The parallel dimensions.
        batches: The micro-batches of one rank.
        precision: Used instead of the settings' precision; None for theirs.

    Raises:
        UsageError: The model or its micro-batches do not divide as the plan requires.
    """
    own = tensor_parallel_config(config, plan.tensor_parallel)
    cache, checkpoint = kv_cache_bytes(own, precision or "bf16"), checkpoint_bytes(config, training)
    check_stages(
        plan.pipeline_parallel,
        training.pipeline_schedule,
        config.num_hidden_layers,
        batches.gradient_accumulation_steps,
    )
    context_and_pipeline = ParallelPlan(
        context_parallel=plan.context_parallel, pipeline_parallel=plan.pipeline_parallel
    )
    check_shape(context_and_pipeline, config)
    return [
        _divide(step, own, plan, batches, training.offload_optimizer, cache, checkpoint)
        for step in _step_memories(own, training, plan, batches, precision)
    ]


def _divide(
    step: StepMemory | PipelineRankMemory,
    own: ModelConfig,
    plan: ParallelPlan,
    batches: BatchPlan,
    offload: bool,
    cache: int,
    checkpoint: int,
) -> RankMemory:
    """The memory of a step as the plan divides it; `own` is the rank's part under tensor parallelism."""
    in_pipeline = isinstance(step, PipelineRankMemory)
    is_sharded = batches.gradient_accumulation_steps == 1 and not in_pipeline
    kept_fraction = 1 / plan.shards if is_sharded else 1.0
    gradients, others = max(step.moments, key=lambda moment: kept_fraction * moment[0] + moment[1])
    gathered = 0
    if plan.shards > 1:
        gathered = step.weights if in_pipeline else 2 * WEIGHT_BYTES * _largest_gathered(own)
    elif plan.data_parallel > 1 and not in_pipeline:
        gathered = step.weights
    return RankMemory(
        weights=step.weights // plan.shards,
        optimizer=0 if offload else step.optimizer // plan.shards,
        gradients=int(gradients * kept_fraction),
        activations=others,
        loss_buffers=step.loss_buffers,
        gathered=gathered,
        kv_cache_per_sequence=cache,
        checkpoint=checkpoint,
        on_host=step.optimizer // plan.shards if offload else 0,
        received=step.buffers if isinstance(step, PipelineRankMemory) else 0,
        saved_by_quantization=0 if isinstance(step, PipelineRankMemory) else step.saved_by_quantization,
    )


def _largest_gathered(config: ModelConfig) -> int:
    """The parameters that FSDP gathers at once: a block, or embeddings and head where those are larger."""
    sizes = params_per_module(config)
    block = sum(sizes[f"{name}.0"] for name in ("ln_1", "attn", "ln_2", "mlp"))
    outside = sum(size for name, size in sizes.items() if name in ("wte", "wpe", "ln_f", "lm_head"))
    return max(block, outside)


def kv_cache_bytes(config: ModelConfig, precision: PrecisionName) -> int:
    """Return the bytes of keys and values of one sequence of full length."""
    bytes_per_value = 4 if precision == "fp32" else 2
    return (
        2
        * bytes_per_value
        * config.num_hidden_layers
        * config.kv_heads
        * config.head_width
        * config.max_position_embeddings
    )


def checkpoint_bytes(config: ModelConfig, training: TrainingConfig) -> int:
    """Return the bytes of one checkpoint on disk over all ranks.

    These are the weights, and the optimizer's moments of the trainable ones, in fp32.
    """
    trained = trainable_sizes(config, training)
    matrices = 0
    # Muon has one moment per matrix of a block. The biases counted with them have two, which is negligible.
    if training.optimizer == "muon":
        matrices = sum(size for name, size in trained.items() if name.startswith(("attn.", "mlp.")))
    return WEIGHT_BYTES * (sum(params_per_module(config).values()) + 2 * sum(trained.values()) - matrices)


@dataclass(frozen=True)
class CommunicationVolume:
    """The bytes that one rank sends in a step, by purpose.

    Ring algorithms are assumed: (n − 1) / n of the data for a reduce-scatter or an all-gather.
    """

    gradients: int
    weights: int
    tensor: int
    pipeline: int = 0
    context: int = 0

    @property
    def total(self) -> int:
        """The bytes for all purposes."""
        return self.gradients + self.weights + self.tensor + self.pipeline + self.context


def communication_volume(
    config: ModelConfig, plan: ParallelPlan, batches: BatchPlan, schedule: str = "1f1b"
) -> CommunicationVolume:
    """Return what one rank sends in a step.

    Gradients are sent in fp32 once per step, and sharded weights in fp32 twice per micro-batch. Tensor
    parallelism sends four sums of the residual stream per layer and micro-batch, in bf16. A pipeline sends
    the residual stream and its gradient in fp32 across each boundary of a stage. Context parallelism sends
    keys, values and their gradients per layer and micro-batch, in bf16. For a pipeline the figure is that of
    a stage of average size with two neighbours, whose shards are gathered once per step.

    Args:
        config: The model.
        plan: The parallel dimensions.
        batches: The micro-batches of one rank.
        schedule: The pipeline schedule.
    """
    own = tensor_parallel_config(config, plan.tensor_parallel)
    micro_batches, shards = batches.gradient_accumulation_steps, plan.shards
    replica = WEIGHT_BYTES * sum(params_per_module(own).values()) // plan.pipeline_parallel
    shard = replica // shards
    gradients = replica * (shards - 1) // shards + 2 * shard * (plan.data_parallel - 1) // plan.data_parallel
    gathers = 2 * micro_batches if plan.pipeline_parallel == 1 else 1
    weights = gathers * replica * (shards - 1) // shards
    tokens = batches.micro_batch_size * config.max_position_embeddings // plan.context_parallel
    stream = 2 * tokens * config.hidden_size
    layers = config.num_hidden_layers // plan.pipeline_parallel
    tensor = 4 * layers * micro_batches * 2 * stream * (plan.tensor_parallel - 1) // plan.tensor_parallel
    boundaries = 2 * stages_of(schedule, 1) if plan.pipeline_parallel > 1 else 0
    keys_and_values = 2 * 2 * tokens * own.kv_heads * own.head_width
    context = 2 * layers * micro_batches * keys_and_values * (plan.context_parallel - 1)
    return CommunicationVolume(gradients, weights, tensor, boundaries * micro_batches * 2 * stream, context)


@dataclass(frozen=True)
class Recommendation:
    """A plan that fits.

    Attributes:
        plan: The parallel dimensions.
        batches: The micro-batches of one rank.
        gradient_checkpointing: Whether activations are recomputed in the backward pass.
        memory: The memory of the rank that needs most.
    """

    plan: ParallelPlan
    batches: BatchPlan
    gradient_checkpointing: bool
    memory: RankMemory


def recommend_plan(
    config: ModelConfig,
    training: TrainingConfig,
    num_ranks: int,
    limit: int,
    batches: BatchPlan,
    *,
    context_parallel: int = 1,
    ranks_per_node: int = 8,
    precision: PrecisionName | None = None,
) -> Recommendation | None:
    """Return the plan with the lowest overhead that fits, or None if none does.

    Replicas are tried before shards, then tensor parallelism (within a node), then pipelines. Activations are
    kept before they are recomputed, and micro-batches are halved last. The global step does not
    change: n pipeline stages leave 1/n of the replicas and shards, each with n times the micro-batches.

    Args:
        config: The model.
        training: The settings.
        num_ranks: The number of ranks to use.
        limit: Bytes that one rank has.
        batches: The micro-batches of one rank without a pipeline.
        context_parallel: The number of ranks over which each sequence is sharded.
        ranks_per_node: The largest tensor group.
        precision: Used instead of the settings' precision; None for theirs.
    """
    ranks = num_ranks // context_parallel
    budget = int(limit * (1 - MEMORY_RESERVE_FRACTION))
    sizes = _PIPELINE_SIZES[: 1 if context_parallel > 1 else None]
    for stages in (size for size in sizes if ranks % size == 0):
        if not _is_valid_pipeline(config, training, stages, batches.gradient_accumulation_steps):
            continue
        of_stage = ranks // stages
        in_stages = replace(batches, gradient_accumulation_steps=stages * batches.gradient_accumulation_steps)
        for tensor in (
            size for size in (1, 2, 4, 8) if size <= min(ranks_per_node, of_stage) and of_stage % size == 0
        ):
            start = ParallelPlan(of_stage // tensor, 1, tensor, stages, context_parallel)
            if _divides(config, tensor) and (
                found := _first_that_fits(config, training, start, in_stages, budget, precision)
            ):
                return found
    return None


def _is_valid_pipeline(
    config: ModelConfig, training: TrainingConfig, stages: int, micro_batches: int
) -> bool:
    try:
        check_stages(stages, training.pipeline_schedule, config.num_hidden_layers, stages * micro_batches)
        check_all_ranks_train(config, training, stages)
    except UsageError:
        return False
    return True


def _first_that_fits(
    config: ModelConfig,
    training: TrainingConfig,
    start: ParallelPlan,
    batches: BatchPlan,
    budget: int,
    precision: PrecisionName | None,
) -> Recommendation | None:
    """The first that fits of the ways to turn replicas into shards and to divide the micro-batches."""
    own, offload = tensor_parallel_config(config, start.tensor_parallel), training.offload_optimizer
    least = _least_bytes(own, training, start.data_parallel * start.context_parallel, precision)
    if not offload and least // start.pipeline_parallel > budget:
        return None  # without running a step
    cache, checkpoint = kv_cache_bytes(own, precision or "bf16"), checkpoint_bytes(config, training)
    sequences = batches.micro_batch_size
    sizes = {
        size for size in (sequences, sequences // 2, sequences // 4, 1) if size and sequences % size == 0
    }
    for size in sorted(sizes, reverse=True):
        divided = BatchPlan(size, batches.gradient_accumulation_steps * sequences // size)
        for recompute in (False, True):
            with_setting = own.model_copy(update={"gradient_checkpointing": recompute})
            steps = _step_memories(with_setting, training, start, divided, precision)
            for fsdp in [1] if offload else _divisors(start.data_parallel):
                plan = replace(start, data_parallel=start.data_parallel // fsdp, fsdp=fsdp)
                memory = max(
                    (_divide(step, own, plan, divided, offload, cache, checkpoint) for step in steps),
                    key=lambda memory: memory.total,
                )
                if memory.total <= budget:
                    return Recommendation(plan, divided, recompute, memory)
    return None


def _step_memories(
    own: ModelConfig,
    training: TrainingConfig,
    plan: ParallelPlan,
    batches: BatchPlan,
    precision: PrecisionName | None,
) -> Sequence[StepMemory] | Sequence[PipelineRankMemory]:
    """The memory of a step on a rank of each position in the pipeline, or on any rank without one."""
    step = {"sequences": batches.micro_batch_size, "micro_batches": batches.gradient_accumulation_steps}
    training = training.model_copy(update={"context_parallel": plan.context_parallel})
    if plan.pipeline_parallel == 1:
        return [step_memory(own, training, **step, precision=precision)]
    return pipeline_rank_memories(own, training, ranks=plan.pipeline_parallel, **step, precision=precision)


def _least_bytes(
    own: ModelConfig, training: TrainingConfig, shards: int, precision: PrecisionName | None
) -> int:
    """A lower bound of a rank's memory: its shard of weights and optimizer state, and autocast's copies.

    Autocast keeps narrow copies of trained matrices only.
    """
    state = checkpoint_bytes(own, training)
    if training.quantize_base != "off":  # a checkpoint contains the floats
        state -= bytes_saved(empty_model(own, "meta"))
    narrow = sum(
        2 * size
        for name, size in trainable_sizes(own, training).items()
        if name.startswith(("attn.", "mlp."))
    )
    return state // shards + (0 if (precision or training.precision) == "fp32" else narrow)


def _divides(config: ModelConfig, tensor_parallel: int) -> bool:
    return (
        config.num_attention_heads % tensor_parallel == 0
        and config.kv_heads % tensor_parallel == 0
        and config.mlp_width % tensor_parallel == 0
    )


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
