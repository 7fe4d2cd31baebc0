"""Will it fit? Memory of one rank by part under a parallel plan, what a step sends, and what to change where
it does not fit.

A step's memory comes from `training/memory/memory_estimator.py`, which runs the step on tensors without
contents. A plan then divides it:

- tensor: each of t ranks holds the shape with 1/t of the heads and of the MLP's inner width, which is a shape like any other; the residual
  stream, the norms, the embeddings and the head are whole on each.
- shard: weights and optimizer are divided; the largest block is gathered whole, twice, while one is used and the next one arrives.
  Gradients are divided where a step is one micro-batch; with accumulation they are whole until the last one, which saves sending.
- replicate: nothing is divided; DistributedDataParallel's buckets are a second copy of the gradients.
- pipeline: each stage holds its layers, and the ends what belongs to them, and ranks need unlike amounts (`training/memory/pipeline_memory.py`).
  Shards of a stage are gathered whole from the first micro-batch of a step to its last, and its gradients are whole until then.
- context: a step is run on the part of each sequence that a rank has, with the keys and values that it gathers; the state is divided as
  by shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llm_trainer.config import TrainingConfig, UsageError
from llm_trainer.config.param_count import part_sizes
from llm_trainer.config.resolve.parallelism import ParallelPlan, check_shape, check_stages, stages_of
from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.model.adapters.nf4 import bytes_saved
from llm_trainer.model.hf.checkpoint import empty_model
from llm_trainer.training.engines.precision import PrecisionName
from llm_trainer.training.memory.memory_estimator import StepMemory, step_memory
from llm_trainer.training.memory.pipeline_memory import PlaceMemory, check_trained, place_memories
from llm_trainer.training.optim.param_groups import trained_sizes

WEIGHT_BYTES = 4
_STAGES = (1, 2, 4, 8, 16)  # pipelines that are tried
RESERVE = 0.1  # share of a device's memory left to the library's context, communication and fragments


@dataclass(frozen=True)
class Plan:
    """So many replicas × shards × ranks that share each sequence × tensor ranks × stages of a pipeline; a rank sends `micro_batches` ×
    `sequences`, or its part of each, through the model in a step.
    """

    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    sequences: int = 8
    micro_batches: int = 1
    offload: bool = False  # the optimizer's state lies in host memory
    pipeline: int = 1
    context: int = 1

    @property
    def ranks(self) -> int:
        """Processes that the plan takes."""
        return self.replicate * self.shards * self.tensor * self.pipeline

    @property
    def shards(self) -> int:
        """Ranks over which a replica's state is cut: those that share sequences too."""
        return self.shard * self.context


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank. `gradients` are those at the step's highest moment, `activations` all else at that
    moment; `on_host` is beside them, in the host's memory; `in_bits` how much more the weights were as
    floats, as which they are saved.
    """

    weights: int
    optimizer: int
    gradients: int
    activations: int
    loss_buffers: int
    gathered: int
    cache_a_sequence: int
    checkpoint: int
    on_host: int = 0
    received: int = 0
    in_bits: int = 0

    @property
    def total(self) -> int:
        """The peak of a training step."""
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
    def copies(self) -> int:
        """What a save in the background takes of the host's memory: this rank's weights, as floats, and
        optimizer state once more.
        """
        return self.weights + self.in_bits + self.optimizer + self.on_host

    def parts(self) -> dict[str, int]:
        """What `total` is made of, in words."""
        named = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations and temporaries": self.activations,
            "loss buffers (logits)": self.loss_buffers,
            "gathered blocks and buckets": self.gathered,
            "buffers between stages": self.received,
        }
        return {name: size for name, size in named.items() if size or name == "gradients"}


def rank_shape(shape: ModelConfig, tensor: int) -> ModelConfig:
    """What one of `tensor` ranks holds. Raises UsageError where heads or widths do not divide."""
    sizes = {"num_attention_heads": shape.num_attention_heads, "MLP width": shape.mlp_width}
    wrong = [f"{name} {size}" for name, size in sizes.items() if size % tensor]
    if wrong:
        raise UsageError(
            f"tensor_parallel {tensor} does not divide {' and '.join(wrong)}; take a divisor of them"
        )
    return shape.model_copy(
        update={
            "head_dim": shape.head_width,
            "num_attention_heads": shape.num_attention_heads // tensor,
            "num_key_value_heads": max(1, shape.kv_heads // tensor),
            "intermediate_size": shape.mlp_width // tensor,
        }
    )


def rank_memory(
    shape: ModelConfig, training: TrainingConfig, plan: Plan, precision: PrecisionName | None = None
) -> RankMemory:
    """Memory of one rank under `plan`, in a pipeline of the one that needs most. Raises UsageError where the
    plan does not divide.
    """
    return max(rank_memories(shape, training, plan, precision), key=lambda memory: memory.total)


def rank_memories(
    shape: ModelConfig, training: TrainingConfig, plan: Plan, precision: PrecisionName | None = None
) -> list[RankMemory]:
    """Memory of a rank of each of a pipeline's places, in their order; of one where there is no pipeline.
    Raises as `rank_memory`.
    """
    own = rank_shape(shape, plan.tensor)
    cache, checkpoint = cache_a_sequence(own, precision or "bf16"), checkpoint_bytes(shape, training)
    check_stages(plan.pipeline, training.pipeline_schedule, shape.num_hidden_layers, plan.micro_batches)
    check_shape(ParallelPlan(context_parallel=plan.context, pipeline_parallel=plan.pipeline), shape)
    return [divided(own, step, plan, cache, checkpoint) for step in _steps(own, training, plan, precision)]


def divided(
    own: ModelConfig, step: StepMemory | PlaceMemory, plan: Plan, cache: int, checkpoint: int
) -> RankMemory:
    """A step's memory as the plan divides it."""
    in_stages = isinstance(step, PlaceMemory)
    share = 1 / plan.shards if plan.micro_batches == 1 and not in_stages else 1.0
    gradients, others = max(step.moments, key=lambda moment: share * moment[0] + moment[1])
    gathered = 0
    if plan.shards > 1:
        gathered = step.weights if in_stages else 2 * WEIGHT_BYTES * largest_block(own)
    elif plan.replicate > 1 and not in_stages:
        gathered = step.weights
    return RankMemory(
        weights=step.weights // plan.shards,
        optimizer=0 if plan.offload else step.optimizer // plan.shards,
        gradients=int(gradients * share),
        activations=others,
        loss_buffers=step.kept,
        gathered=gathered,
        cache_a_sequence=cache,
        checkpoint=checkpoint,
        on_host=step.optimizer // plan.shards if plan.offload else 0,
        received=step.buffers if isinstance(step, PlaceMemory) else 0,
        in_bits=0 if isinstance(step, PlaceMemory) else step.in_bits,
    )


def largest_block(shape: ModelConfig) -> int:
    """Parameters that are gathered at once: a block's, or the embeddings' and the head's where those are
    more.
    """
    sizes = part_sizes(shape)
    block = sum(sizes[f"{part}.0"] for part in ("ln_1", "attn", "ln_2", "mlp"))
    return max(block, sum(size for name, size in sizes.items() if name in ("wte", "wpe", "ln_f", "lm_head")))


def cache_a_sequence(shape: ModelConfig, precision: PrecisionName) -> int:
    """Bytes of keys and values of one sequence of full length."""
    width = 4 if precision == "fp32" else 2
    return (
        2
        * width
        * shape.num_hidden_layers
        * shape.kv_heads
        * shape.head_width
        * shape.max_position_embeddings
    )


def checkpoint_bytes(shape: ModelConfig, training: TrainingConfig) -> int:
    """Bytes of one checkpoint on disk, over all ranks: weights, and the optimizer's averages of those that
    are trained, in fp32.
    """
    trained = trained_sizes(shape, training)
    matrices = 0
    if (
        training.optimizer == "muon"
    ):  # one average for a block's matrices; the biases among these have two, which is too little to count
        matrices = sum(size for name, size in trained.items() if name.startswith(("attn.", "mlp.")))
    return WEIGHT_BYTES * (sum(part_sizes(shape).values()) + 2 * sum(trained.values()) - matrices)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in a step, by what for (ring algorithms: (n − 1) / n of the data once for
    each half).
    """

    gradients: int
    gathering: int
    tensor: int
    pipeline: int = 0
    context: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.gradients + self.gathering + self.tensor + self.pipeline + self.context


def traffic(shape: ModelConfig, plan: Plan, schedule: str = "1f1b") -> Traffic:
    """What one rank sends: gradients in fp32 once a step, weights in fp32 twice a micro-batch where they are
    sharded, four sums of the residual stream in bf16 a layer and micro-batch where tensors are, the stream
    and its gradient in fp32 over each edge of a stage; keys and values and their gradients in bf16 a layer
    and micro-batch where sequences are shared.

    In a pipeline a stage of average size with neighbours on both sides is meant, whose shards are gathered
    once a step.
    """
    own = rank_shape(shape, plan.tensor)
    held = WEIGHT_BYTES * sum(part_sizes(own).values()) // plan.pipeline
    part = held // plan.shards
    gradients = held * (plan.shards - 1) // plan.shards + 2 * part * (plan.replicate - 1) // plan.replicate
    times = 2 * plan.micro_batches if plan.pipeline == 1 else 1
    gathering = times * held * (plan.shards - 1) // plan.shards
    tokens = plan.sequences * shape.max_position_embeddings // plan.context
    stream = 2 * tokens * shape.hidden_size
    layers = shape.num_hidden_layers // plan.pipeline
    sums = 4 * layers * plan.micro_batches * 2 * stream * (plan.tensor - 1) // plan.tensor
    edges = 2 * stages_of(schedule, 1) * plan.micro_batches * 2 * stream if plan.pipeline > 1 else 0
    keys_and_values = 2 * 2 * tokens * own.kv_heads * own.head_width
    shared = 2 * layers * plan.micro_batches * keys_and_values * (plan.context - 1)
    return Traffic(gradients, gathering, sums, edges, shared)


@dataclass(frozen=True)
class Advice:
    """A plan that fits, whether it recomputes activations, and what a rank then holds."""

    plan: Plan
    recompute: bool
    memory: RankMemory


def recommend(
    shape: ModelConfig,
    training: TrainingConfig,
    ranks: int,
    limit: int,
    plan: Plan,
    *,
    node: int = 8,
    precision: PrecisionName | None = None,
) -> Advice | None:
    """The first that fits `limit` bytes a rank, in the order of what costs least; None where nothing does.

    Replicas before shards before tensors (within a node) before stages, whole activations before recomputed
    ones, and micro-batches halved last. A step of the whole run stays what it is: n stages leave an n-th of
    the replicas and shards, each with n times the micro-batches. As many ranks share each sequence as `plan`
    says.
    """
    ranks //= plan.context
    for stages in (size for size in _STAGES[: 1 if plan.context > 1 else None] if ranks % size == 0):
        if not _can_be_staged(shape, training, stages, plan.micro_batches):
            continue
        for tensor in (
            size
            for size in (1, 2, 4, 8)
            if size <= min(node, ranks // stages) and ranks // stages % size == 0
        ):
            start = replace(
                plan, pipeline=stages, tensor=tensor, replicate=ranks // stages // tensor, shard=1
            )
            start = replace(start, micro_batches=stages * plan.micro_batches)
            if _divides(shape, tensor) and (
                found := _first_that_fits(shape, training, start, int(limit * (1 - RESERVE)), precision)
            ):
                return found
    return None


def _can_be_staged(shape: ModelConfig, training: TrainingConfig, stages: int, micro_batches: int) -> bool:
    try:
        check_stages(stages, training.pipeline_schedule, shape.num_hidden_layers, stages * micro_batches)
        check_trained(shape, training, stages)
    except UsageError:
        return False
    return True


def _first_that_fits(
    shape: ModelConfig, training: TrainingConfig, start: Plan, budget: int, precision: PrecisionName | None
) -> Advice | None:
    """Of the ways to divide the replicas of `start` into shards, and its steps into micro-batches."""
    own = rank_shape(shape, start.tensor)
    if (
        not start.offload
        and _at_least(own, training, start.replicate * start.context, precision) // start.pipeline > budget
    ):
        return None  # without running anything
    cache, checkpoint = cache_a_sequence(own, precision or "bf16"), checkpoint_bytes(shape, training)
    sizes = {
        size
        for size in (start.sequences, start.sequences // 2, start.sequences // 4, 1)
        if size and start.sequences % size == 0
    }
    for sequences in sorted(sizes, reverse=True):
        division = replace(
            start, sequences=sequences, micro_batches=start.micro_batches * start.sequences // sequences
        )
        for recompute in (False, True):
            steps = _steps(
                own.model_copy(update={"gradient_checkpointing": recompute}), training, division, precision
            )
            for shard in [1] if start.offload else _shards(start.replicate):
                trial = replace(division, replicate=start.replicate // shard, shard=shard)
                memory = max(
                    (divided(own, step, trial, cache, checkpoint) for step in steps),
                    key=lambda memory: memory.total,
                )
                if memory.total <= budget:
                    return Advice(trial, recompute, memory)
    return None


def _steps(
    own: ModelConfig, training: TrainingConfig, plan: Plan, precision: PrecisionName | None
) -> Sequence[StepMemory] | Sequence[PlaceMemory]:
    """A step's memory on a rank of each place of a pipeline, or on the only one."""
    run = {"sequences": plan.sequences, "micro_batches": plan.micro_batches}
    training = training.model_copy(update={"context_parallel": plan.context})
    if plan.pipeline == 1:
        return [step_memory(own, training, **run, precision=precision)]
    return place_memories(own, training, ranks=plan.pipeline, **run, precision=precision)


def _at_least(
    own: ModelConfig, training: TrainingConfig, shards: int, precision: PrecisionName | None
) -> int:
    """What a rank cannot do without: its share of weights and optimizer, and the narrow copies that autocast
    makes of trained matrices.
    """
    held = checkpoint_bytes(own, training)
    if training.quantize_base != "off":  # a checkpoint holds the floats
        held -= bytes_saved(empty_model(own, "meta"))
    narrow = sum(
        2 * size for part, size in trained_sizes(own, training).items() if part.startswith(("attn.", "mlp."))
    )
    return held // shards + (0 if (precision or training.precision) == "fp32" else narrow)


def _divides(shape: ModelConfig, tensor: int) -> bool:
    return (
        shape.num_attention_heads % tensor == 0
        and shape.kv_heads % tensor == 0
        and shape.mlp_width % tensor == 0
    )


def _shards(ranks: int) -> list[int]:
    return [size for size in range(1, ranks + 1) if ranks % size == 0]
