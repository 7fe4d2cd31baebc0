"""Will it fit? Memory of one rank by part under a parallel plan, what a step sends, and what to change where it does not fit.

A step's memory comes from `training/footprint.py`, which runs the step on tensors without contents. A plan then divides it:

- tensor: each of t ranks holds the shape with 1/t of the heads, of the MLP's inner width and of the vocabulary, which is a shape like any
  other; the residual stream is whole on each.
- shard: weights and optimizer are divided; the largest block is gathered whole, twice, while one is used and the next one arrives.
  Gradients are divided where a step is one micro-batch; with accumulation they are whole until the last one, which saves sending.
- replicate: nothing is divided; DistributedDataParallel's buckets are a second copy of the gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llm_trainer.config import TrainingConfig, UsageError
from llm_trainer.config.counting import part_sizes
from llm_trainer.config.model import ModelConfig
from llm_trainer.training.footprint import StepMemory, step_memory
from llm_trainer.training.precision import PrecisionName

WEIGHT_BYTES = 4
RESERVE = 0.1  # share of a device's memory left to the library's context, communication and fragments


@dataclass(frozen=True)
class Plan:
    """So many replicas × shards × tensor ranks; a rank sends `micro_batches` × `sequences` through the model in a step."""

    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    sequences: int = 8
    micro_batches: int = 1
    offload: bool = False  # the optimizer's state lies in host memory

    @property
    def ranks(self) -> int:
        """Processes that the plan takes."""
        return self.replicate * self.shard * self.tensor


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank. `gradients` are those at the step's highest moment, `activations` all else at that moment; `on_host` is
    beside them, in the host's memory.
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

    @property
    def total(self) -> int:
        """The peak of a training step."""
        return self.weights + self.optimizer + self.gradients + self.activations + self.loss_buffers + self.gathered

    @property
    def copies(self) -> int:
        """What a save in the background takes of the host's memory: this rank's weights and optimizer state once more."""
        return self.weights + self.optimizer + self.on_host

    def parts(self) -> dict[str, int]:
        """What `total` is made of, in words."""
        named = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations and temporaries": self.activations,
            "loss buffers (logits)": self.loss_buffers,
            "gathered blocks and buckets": self.gathered,
        }
        return {name: size for name, size in named.items() if size or name == "gradients"}


def rank_shape(shape: ModelConfig, tensor: int) -> ModelConfig:
    """What one of `tensor` ranks holds. Raises UsageError where heads or widths do not divide."""
    sizes = {"num_attention_heads": shape.num_attention_heads, "MLP width": shape.mlp_width}
    wrong = [f"{name} {size}" for name, size in sizes.items() if size % tensor]
    if wrong:
        raise UsageError(f"tensor_parallel {tensor} does not divide {' and '.join(wrong)}; take a divisor of them")
    return shape.model_copy(
        update={
            "head_dim": shape.head_width,
            "num_attention_heads": shape.num_attention_heads // tensor,
            "num_key_value_heads": max(1, shape.kv_heads // tensor),
            "intermediate_size": shape.mlp_width // tensor,
            "vocab_size": -(-shape.vocab_size // tensor),
        }
    )


def rank_memory(shape: ModelConfig, training: TrainingConfig, plan: Plan, precision: PrecisionName | None = None) -> RankMemory:
    """Memory of one rank under `plan`. Raises UsageError for a plan that does not divide the shape."""
    own = rank_shape(shape, plan.tensor)
    step = step_memory(own, training, sequences=plan.sequences, micro_batches=plan.micro_batches, precision=precision)
    return divided(own, step, plan, cache_a_sequence(own, precision or "bf16"), checkpoint_bytes(shape, training))


def divided(own: ModelConfig, step: StepMemory, plan: Plan, cache: int, checkpoint: int) -> RankMemory:
    """A step's memory as the plan divides it."""
    share = 1 / plan.shard if plan.micro_batches == 1 else 1.0
    gradients, others = max(step.moments, key=lambda moment: share * moment[0] + moment[1])
    gathered = 0
    if plan.shard > 1:
        gathered = 2 * WEIGHT_BYTES * largest_block(own)
    elif plan.replicate > 1:
        gathered = step.weights
    return RankMemory(
        weights=step.weights // plan.shard,
        optimizer=0 if plan.offload else step.optimizer // plan.shard,
        gradients=int(gradients * share),
        activations=others,
        loss_buffers=step.kept,
        gathered=gathered,
        cache_a_sequence=cache,
        checkpoint=checkpoint,
        on_host=step.optimizer // plan.shard if plan.offload else 0,
    )


def largest_block(shape: ModelConfig) -> int:
    """Parameters that are gathered at once: a block's, or the embeddings' and the head's where those are more."""
    sizes = part_sizes(shape)
    block = sum(sizes[f"{part}.0"] for part in ("ln_1", "attn", "ln_2", "mlp"))
    return max(block, sum(size for name, size in sizes.items() if name in ("wte", "wpe", "ln_f", "lm_head")))


def cache_a_sequence(shape: ModelConfig, precision: PrecisionName) -> int:
    """Bytes of keys and values of one sequence of full length."""
    width = 4 if precision == "fp32" else 2
    return 2 * width * shape.num_hidden_layers * shape.kv_heads * shape.head_width * shape.max_position_embeddings


def checkpoint_bytes(shape: ModelConfig, training: TrainingConfig) -> int:
    """Bytes of one checkpoint on disk, over all ranks: weights and the optimizer's averages in fp32."""
    sizes = part_sizes(shape)
    matrices = 0
    if training.optimizer == "muon":  # one average for a block's matrices; the biases among these have two, which is too little to count
        matrices = sum(size for name, size in sizes.items() if name.startswith(("attn.", "mlp.")))
    return WEIGHT_BYTES * (3 * sum(sizes.values()) - matrices)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in a step, by what for (ring algorithms: (n − 1) / n of the data once for each half)."""

    gradients: int
    gathering: int
    tensor: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.gradients + self.gathering + self.tensor


def traffic(shape: ModelConfig, plan: Plan) -> Traffic:
    """What one rank sends: gradients in fp32 once a step, weights in fp32 twice a micro-batch where they are sharded, and four sums of
    the residual stream in bf16 a layer and micro-batch where tensors are."""
    held = WEIGHT_BYTES * sum(part_sizes(rank_shape(shape, plan.tensor)).values())
    part = held // plan.shard
    gradients = held * (plan.shard - 1) // plan.shard + 2 * part * (plan.replicate - 1) // plan.replicate
    gathering = 2 * plan.micro_batches * held * (plan.shard - 1) // plan.shard
    stream = 2 * plan.sequences * shape.max_position_embeddings * shape.hidden_size
    sums = 4 * shape.num_hidden_layers * plan.micro_batches * 2 * stream * (plan.tensor - 1) // plan.tensor
    return Traffic(gradients, gathering, sums)


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

    Replicas before shards before tensors (within a node), whole activations before recomputed ones, and micro-batches halved last.
    """
    budget = int(limit * (1 - RESERVE))
    for tensor in (size for size in (1, 2, 4, 8) if size <= min(node, ranks) and ranks % size == 0 and _divides(shape, size)):
        own = rank_shape(shape, tensor)
        if not plan.offload and _at_least(own, training, ranks // tensor, precision) > budget:
            continue  # without running anything
        for sequences in sorted({plan.sequences, max(1, plan.sequences // 2), max(1, plan.sequences // 4), 1}, reverse=True):
            times = plan.micro_batches * plan.sequences // sequences
            for recompute in (False, True):
                step = step_memory(
                    own.model_copy(update={"gradient_checkpointing": recompute}),
                    training,
                    sequences=sequences,
                    micro_batches=times,
                    precision=precision,
                )
                for shard in [1] if plan.offload else _shards(ranks // tensor):
                    trial = replace(
                        plan, replicate=ranks // tensor // shard, shard=shard, tensor=tensor, sequences=sequences, micro_batches=times
                    )
                    memory = divided(own, step, trial, cache_a_sequence(own, precision or "bf16"), checkpoint_bytes(shape, training))
                    if memory.total <= budget:
                        return Advice(trial, recompute, memory)
    return None


def _at_least(own: ModelConfig, training: TrainingConfig, shards: int, precision: PrecisionName | None) -> int:
    """What a rank cannot do without: its share of weights and optimizer, and the narrow copies that autocast makes of matrices."""
    held = checkpoint_bytes(own, training)
    narrow = 0 if (precision or training.precision) == "fp32" else held // (WEIGHT_BYTES * 3) * 2
    return held // shards + narrow


def _divides(shape: ModelConfig, tensor: int) -> bool:
    return shape.num_attention_heads % tensor == 0 and shape.mlp_width % tensor == 0


def _shards(ranks: int) -> list[int]:
    return [size for size in range(1, ranks + 1) if ranks % size == 0]
