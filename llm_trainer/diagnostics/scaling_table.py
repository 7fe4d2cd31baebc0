"""The tables of docs/scaling.md, from preflight's own model: `python -m
llm_trainer.diagnostics.scaling_table`.
"""

from __future__ import annotations

from collections.abc import Iterator

from llm_trainer.config import ModelConfig, TrainingConfig
from llm_trainer.config.param_count import parameter_count
from llm_trainer.config.resolve.parallelism import stages_of
from llm_trainer.diagnostics.memory_plan import Plan, rank_memories, recommend, traffic

LLAMA = {"model_type": "llama", "max_position_embeddings": 4096}
# name → shape and the micro-batch that is tried first
SHAPES: dict[str, tuple[dict[str, object], int]] = {
    "125 M": ({"model_type": "gpt2"}, 8),
    "1.3 B": (
        {"model_type": "gpt2", "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16},
        8,
    ),
    "7 B": (
        {
            **LLAMA,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "intermediate_size": 11008,
        },
        1,
    ),
    "70 B": (
        {
            **LLAMA,
            "hidden_size": 8192,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "intermediate_size": 28672,
        },
        1,
    ),
}
RANKS = (1, 8, 64, 1024)
LIMIT = 80 * 10**9
# name, plan, whether activations are recomputed: what stages need under each schedule
STAGED: tuple[tuple[str, Plan, bool], ...] = (
    ("7 B", Plan(tensor=1, pipeline=8, sequences=1, micro_batches=16), True),
    ("70 B", Plan(tensor=8, pipeline=8, sequences=1, micro_batches=16), True),
    ("70 B", Plan(tensor=8, pipeline=8, sequences=1, micro_batches=16), False),
)


def rows() -> Iterator[str]:
    """One line a size and number of GPUs."""
    yield "| parameters | GPUs | replicas × shards × tensor | micro-batch × context | recomputed | peak of a rank | a rank sends a step |"
    yield "|---|--:|---|---|---|--:|--:|"
    training = TrainingConfig(precision="bf16")
    for name, (settings, sequences) in SHAPES.items():
        shape = ModelConfig.model_validate(settings)
        for ranks in RANKS:
            advice = recommend(shape, training, ranks, LIMIT, Plan(sequences=sequences))
            head = f"| {name} ({parameter_count(shape) / 1e9:.2f} B) | {ranks} |"
            if advice is None:
                yield f"{head} nothing fits | – | – | – | – |"
                continue
            plan, context = advice.plan, shape.max_position_embeddings
            steps = f"{plan.sequences} × {context}" + (
                f", {plan.micro_batches} times" if plan.micro_batches > 1 else ""
            )
            ways = f"{plan.replicate} × {plan.shard} × {plan.tensor}"
            peak, sent = advice.memory.total / 1e9, traffic(shape, plan).total / 1e9
            yield f"{head} {ways} | {steps} | {'yes' if advice.recompute else 'no'} | {peak:.1f} GB | {sent:.2f} GB |"


def stage_rows() -> Iterator[str]:
    """One line a plan with stages and schedule."""
    yield (
        "| parameters | GPUs | tensor × pipeline | schedule | micro-batches × context | recomputed | peak, first – last rank | "
        "a rank sends a step | idle |"
    )
    yield "|---|--:|---|---|---|---|--:|--:|--:|"
    for name, plan, recompute in STAGED:
        shape = ModelConfig.model_validate({**SHAPES[name][0], "gradient_checkpointing": recompute})
        for schedule in ("gpipe", "1f1b", "interleaved"):
            training = TrainingConfig.model_validate({"precision": "bf16", "pipeline_schedule": schedule})
            peaks = [memory.total / 1e9 for memory in rank_memories(shape, training, plan)]
            sent = traffic(shape, plan, schedule).total / 1e9
            edges = plan.pipeline - 1
            idle = edges / (edges + stages_of(schedule, 1) * plan.micro_batches)
            yield (
                f"| {name} | {plan.ranks} | {plan.tensor} × {plan.pipeline} | {schedule} | "
                f"{plan.micro_batches} × {shape.max_position_embeddings} | {'yes' if recompute else 'no'} | "
                f"{peaks[0]:.1f} – {peaks[-1]:.1f} GB | {sent:.2f} GB | {idle:.0%} |"
            )


if __name__ == "__main__":
    for table in (rows(), stage_rows()):
        for row in table:
            print(row, flush=True)
        print()
