"""Prints the tables of docs/explanation/scaling.md, from the memory model of `llm-trainer preflight`.

python -m llm_trainer.diagnostics.scaling_table
"""

from __future__ import annotations

from collections.abc import Iterator

from llm_trainer.config import ModelConfig, TrainingConfig
from llm_trainer.config.param_count import parameter_count
from llm_trainer.config.resolve.batch_size import BatchPlan
from llm_trainer.config.resolve.parallelism import ParallelPlan, stages_of
from llm_trainer.diagnostics.memory_plan import communication_volume, rank_memories, recommend_plan

LLAMA = {"model_type": "llama", "max_position_embeddings": 4096}
# name → model settings and the micro-batch size that is tried first
MODELS: dict[str, tuple[dict[str, object], int]] = {
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
LIMIT = 80 * 10**9  # bytes of one GPU
# model, parallel plan, whether activations are recomputed: what pipelines need under each schedule
PIPELINES: tuple[tuple[str, ParallelPlan, bool], ...] = (
    ("7 B", ParallelPlan(pipeline_parallel=8), True),
    ("70 B", ParallelPlan(tensor_parallel=8, pipeline_parallel=8), True),
    ("70 B", ParallelPlan(tensor_parallel=8, pipeline_parallel=8), False),
)
PIPELINE_BATCHES = BatchPlan(1, 16)


def scaling_rows() -> Iterator[str]:
    """Yield a Markdown table of recommended plans, one row per model and number of GPUs."""
    yield (
        "| parameters | GPUs | replicas × shards × tensor | micro-batch × context | recomputed | "
        "peak of a rank | a rank sends per step |"
    )
    yield "|---|--:|---|---|---|--:|--:|"
    training = TrainingConfig(precision="bf16")
    for name, (settings, micro_batch_size) in MODELS.items():
        config = ModelConfig.model_validate(settings)
        for num_ranks in RANKS:
            found = recommend_plan(config, training, num_ranks, LIMIT, BatchPlan(micro_batch_size, 1))
            head = f"| {name} ({parameter_count(config) / 1e9:.2f} B) | {num_ranks} |"
            if found is None:
                yield f"{head} nothing fits | – | – | – | – |"
                continue
            plan, batches = found.plan, found.batches
            times = batches.gradient_accumulation_steps
            step = f"{batches.micro_batch_size} × {config.max_position_embeddings}"
            step += f", {times} times" if times > 1 else ""
            sizes = f"{plan.data_parallel} × {plan.fsdp} × {plan.tensor_parallel}"
            recomputed = "yes" if found.gradient_checkpointing else "no"
            peak = found.memory.total / 1e9
            sent = communication_volume(config, plan, batches).total / 1e9
            yield f"{head} {sizes} | {step} | {recomputed} | {peak:.1f} GB | {sent:.2f} GB |"


def pipeline_rows() -> Iterator[str]:
    """Yield a Markdown table of pipelines, one row per plan and schedule."""
    yield (
        "| parameters | GPUs | tensor × pipeline | schedule | micro-batches × context | recomputed | "
        "peak, first – last rank | a rank sends per step | idle |"
    )
    yield "|---|--:|---|---|---|---|--:|--:|--:|"
    micro_batches = PIPELINE_BATCHES.gradient_accumulation_steps
    for name, plan, recompute in PIPELINES:
        config = ModelConfig.model_validate({**MODELS[name][0], "gradient_checkpointing": recompute})
        for schedule in ("gpipe", "1f1b", "interleaved"):
            training = TrainingConfig.model_validate({"precision": "bf16", "pipeline_schedule": schedule})
            memories = rank_memories(config, training, plan, PIPELINE_BATCHES)
            peaks = [memory.total / 1e9 for memory in memories]
            sent = communication_volume(config, plan, PIPELINE_BATCHES, schedule).total / 1e9
            boundaries = plan.pipeline_parallel - 1
            idle = boundaries / (boundaries + stages_of(schedule, 1) * micro_batches)
            yield (
                f"| {name} | {plan.ranks} | {plan.tensor_parallel} × {plan.pipeline_parallel} | {schedule} | "
                f"{micro_batches} × {config.max_position_embeddings} | {'yes' if recompute else 'no'} | "
                f"{peaks[0]:.1f} – {peaks[-1]:.1f} GB | {sent:.2f} GB | {idle:.0%} |"
            )


if __name__ == "__main__":
    for table in (scaling_rows(), pipeline_rows()):
        for row in table:
            print(row, flush=True)
        print()
