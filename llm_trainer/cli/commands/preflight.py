"""`llm-trainer preflight` and `debug_memory.py`: the memory of a training step.

The first estimates it and recommends a plan that fits; the second measures it on an existing model as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_trainer.cli.setup.parse_command import new_console, parse_command
from llm_trainer.cli.specs import DEBUG_MEMORY, PREFLIGHT, MemoryOptions, PreflightOptions
from llm_trainer.config import TrainingConfig, UsageError
from llm_trainer.config.resolve.batch_size import BatchPlan, divisions
from llm_trainer.config.resolve.parallelism import ParallelPlan

if TYPE_CHECKING:
    from rich.console import Console

    from llm_trainer.diagnostics.memory_plan import RankMemory

GIGABYTE = 1e9
TOO_LARGE = 1


def run(argv: list[str]) -> int:
    """Print the memory of a step; return 0 if it fits, else print a plan that fits and return 1."""
    loaded = parse_command(PREFLIGHT, argv)
    if loaded is None:
        return 0
    assert isinstance(loaded.options, PreflightOptions)
    from llm_trainer.cli.setup.build_model import is_pretrained, pretrained_model_config
    from llm_trainer.config.param_count import parameter_count
    from llm_trainer.diagnostics.memory_plan import (
        MEMORY_RESERVE_FRACTION,
        communication_volume,
        rank_memories,
        recommend_plan,
    )

    shape, training, own = loaded.config.model, loaded.config.training, loaded.options
    if is_pretrained(training.init_from):
        shape = pretrained_model_config(training.init_from, shape, training.adapter_from)
    assert loaded.settings is not None, "preflight resumes no run"
    plan, batches = loaded.settings.plan, loaded.settings.batches
    bounds = loaded.settings.micro_batch_bounds
    limit = int(own.memory_gb * GIGABYTE) if own.memory_gb is not None else _free_memory()
    available = limit * (1 - MEMORY_RESERVE_FRACTION)
    for candidate in [batches] if bounds is None else divisions(batches, bounds):
        batches = candidate  # the first that fits, or the last
        memories = rank_memories(shape, training, plan, batches)
        memory = max(memories, key=lambda one: one.total)
        if memory.total <= available:
            break
    console = new_console()
    console.print(
        f"{parameter_count(shape):,} parameters, {_describe(plan, batches)}, "
        f"context {shape.max_position_embeddings}\n",
        markup=False,
    )
    _print_parts(console, memory)
    if len(memories) > 1:
        each = ", ".join(_gb(one.total) for one in memories)
        console.print(
            f"The peaks of the pipeline ranks ({training.pipeline_schedule}) are {each}; "
            "the parts above are those of the largest."
        )
    if plan.ranks > 1:
        sent = communication_volume(shape, plan, batches, training.pipeline_schedule).total
        console.print(f"Each rank sends {_gb(sent)} per step.")
    fits = memory.total <= available
    console.print(
        f"\n{'It fits' if fits else 'It does not fit'}: {_gb(memory.total)} of {_gb(limit)}, "
        f"of which {MEMORY_RESERVE_FRACTION:.0%} are kept free"
    )
    if fits:
        return 0
    found = recommend_plan(
        shape, training, plan.ranks, limit, batches, context_parallel=plan.context_parallel
    )
    if found is None:
        console.print(
            "No plan fits on this number of ranks; use more ranks, a smaller model or "
            "a smaller max_position_embeddings."
        )
    else:
        recompute = ", gradient_checkpointing=True" if found.gradient_checkpointing else ""
        console.print(
            f"This plan fits, with {_gb(found.memory.total)}: "
            f"{_describe(found.plan, found.batches)}{recompute}",
            markup=False,
        )
    return TOO_LARGE


def debug_memory(argv: list[str]) -> int:
    """Print the estimated memory of a step on an existing model, and the measured peak of a real step."""
    loaded = parse_command(DEBUG_MEMORY, argv)
    if loaded is None:
        return 0
    assert isinstance(loaded.options, MemoryOptions)
    own = loaded.options
    if own.model_path is None:
        raise UsageError(
            "--model_path is missing; give a run folder, a checkpoint or the name of a model on the hub"
        )
    from llm_trainer.diagnostics.measure_memory import measure_step_memory
    from llm_trainer.diagnostics.memory_plan import rank_memory
    from llm_trainer.inference.load_model import load_transformer, resolve_model

    model = load_transformer(resolve_model(own.model_path))
    shape = model.config
    training = TrainingConfig(precision=own.precision, optimizer=own.optimizer, device="cpu")
    memory = rank_memory(shape, training, ParallelPlan(), BatchPlan(own.batch_size, 1), own.precision)
    console = new_console()
    console.print(
        f"{own.model_path}: a training step of {own.batch_size} × {shape.max_position_embeddings} tokens\n",
        markup=False,
    )
    _print_parts(console, memory)
    estimated = memory.gradients + memory.activations
    measured = measure_step_memory(shape, training, own.batch_size, model=model)
    console.print(f"\nGradients and activations: estimated {_mb(estimated)}, measured {_mb(measured)}")
    return 0


def _print_parts(console: Console, memory: RankMemory) -> None:
    rows = {**memory.parts(), "peak of a rank": memory.total}
    width = max(map(len, rows))
    for name, size in rows.items():
        console.print(f"  {name:<{width}}  {_mb(size):>14}", markup=False)
    if memory.on_host:
        console.print(f"In host memory: optimizer {_mb(memory.on_host)}.")
    console.print(
        f"In addition: KV cache of one sequence {_mb(memory.kv_cache_per_sequence)}, "
        f"checkpoint on disk {_mb(memory.checkpoint)}, "
        f"copy in host memory for asynchronous saves {_mb(memory.async_save_copy)}."
    )


def _describe(plan: ParallelPlan, batches: BatchPlan) -> str:
    """`2 replicas × 4 shards, 1 micro-batch of 8 sequences`, without the factors that are 1."""
    factors = {
        "replicas": plan.data_parallel,
        "shards": plan.fsdp,
        "tensor ranks": plan.tensor_parallel,
        "pipeline ranks": plan.pipeline_parallel,
        "context ranks": plan.context_parallel,
    }
    sizes = " × ".join(f"{number} {name}" for name, number in factors.items() if number > 1)
    steps, size = batches.gradient_accumulation_steps, batches.micro_batch_size
    step = f"{steps} micro-batch{'es' if steps != 1 else ''} of {size} sequence{'s' if size != 1 else ''}"
    return f"{sizes or '1 rank'}, {step}"


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def _gb(size: float) -> str:
    return f"{size / GIGABYTE:,.2f} GB"


def _free_memory() -> int:
    """The free memory of the GPU, or of the machine without one, in bytes."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)
