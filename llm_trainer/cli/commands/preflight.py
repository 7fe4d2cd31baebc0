"""`llm-trainer preflight` and `debug_memory.py`: a step's memory by part, estimated, and for a model that is
there measured as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_trainer.cli.scripts import DEBUG_MEMORY, PREFLIGHT, MemoryOptions, PreflightOptions
from llm_trainer.cli.setup.parse_command import new_console, open_door
from llm_trainer.config import TrainingConfig, UsageError
from llm_trainer.config.resolve.batch_size import divisions, micro_batch_bounds, resolve_batches

if TYPE_CHECKING:
    from rich.console import Console

    from llm_trainer.diagnostics.memory_plan import Plan, RankMemory

GIGABYTE = 1e9
TOO_LARGE = 1


def run(argv: list[str]) -> int:
    """Print what a step needs; 0 where it fits, 1 where not, with what would."""
    loaded = open_door(PREFLIGHT, argv)
    if loaded is None:
        return 0
    assert isinstance(loaded.own, PreflightOptions)
    from llm_trainer.cli.setup.build_model import is_pretrained, pretrained_shape
    from llm_trainer.config.param_count import parameter_count
    from llm_trainer.diagnostics.memory_plan import RESERVE, Plan, rank_memories, recommend, traffic

    shape, training, own = loaded.config.model, loaded.config.training, loaded.own
    if is_pretrained(training.init_from):
        shape = pretrained_shape(training.init_from, shape, training.adapter_from)
    replicas = training.data_parallel or 1
    batches, bounds = resolve_batches(training, replicas * training.fsdp), micro_batch_bounds(loaded.config)
    limit = int(own.memory_gb * GIGABYTE) if own.memory_gb is not None else _free_memory()
    for division in (
        [batches] if bounds is None else divisions(batches, bounds)
    ):  # the first that fits, or the last
        sequences, times = division.micro_batch_size, division.gradient_accumulation_steps
        plan = Plan(
            replicas, training.fsdp, training.tensor_parallel, sequences, times, training.offload_optimizer, training.pipeline_parallel,
            training.context_parallel,
        )  # fmt: skip
        places = rank_memories(shape, training, plan)
        memory = max(places, key=lambda place: place.total)
        if memory.total <= limit * (1 - RESERVE):
            break
    console = new_console()
    console.print(
        f"{parameter_count(shape):,} parameters, {_in_words(plan)}, context {shape.max_position_embeddings}\n",
        markup=False,
    )
    _print_parts(console, memory)
    if len(places) > 1:
        each = ", ".join(_gb(place.total) for place in places)
        console.print(
            f"the ranks of the pipeline at their peaks ({training.pipeline_schedule}), of which the parts of the largest are above: {each}"
        )
    if plan.ranks > 1:
        console.print(f"each rank sends {_gb(traffic(shape, plan, training.pipeline_schedule).total)} a step")
    fits = memory.total <= limit * (1 - RESERVE)
    console.print(
        f"\n{'It fits' if fits else 'It does not fit'}: {_gb(memory.total)} of {_gb(limit)}, {RESERVE:.0%} of which are left free"
    )
    if fits:
        return 0
    advice = recommend(shape, training, plan.ranks, limit, plan)
    if advice is None:
        console.print(
            "Nothing fits on as many ranks: take more ranks, a smaller model or a shorter max_position_embeddings."
        )
    else:
        recompute = ", gradient_checkpointing=True" if advice.recompute else ""
        console.print(
            f"This would, with {_gb(advice.memory.total)}: {_in_words(advice.plan)}{recompute}", markup=False
        )
    return TOO_LARGE


def debug_memory(argv: list[str]) -> int:
    """Print a model's memory by part, and the peak of a real step on it beside the estimate."""
    loaded = open_door(DEBUG_MEMORY, argv)
    if loaded is None:
        return 0
    assert isinstance(loaded.own, MemoryOptions)
    own = loaded.own
    if own.model_path is None:
        raise UsageError(
            "no model is named: give --model_path with a run folder, a checkpoint or the name of a model on the hub"
        )
    from llm_trainer.diagnostics.measure_memory import measured_step
    from llm_trainer.diagnostics.memory_plan import Plan, rank_memory
    from llm_trainer.inference.load_model import find_model, load_transformer

    model = load_transformer(find_model(own.model_path))
    shape = model.config
    training = TrainingConfig(precision=own.precision, optimizer=own.optimizer, device="cpu")
    memory = rank_memory(shape, training, Plan(sequences=own.batch_size), own.precision)
    console = new_console()
    console.print(
        f"{own.model_path}: a training step of {own.batch_size} × {shape.max_position_embeddings} tokens\n",
        markup=False,
    )
    _print_parts(console, memory)
    estimated = memory.gradients + memory.activations
    measured = measured_step(shape, training, own.batch_size, model=model)
    console.print(f"\ngradients and activations: estimated {_mb(estimated)}, measured {_mb(measured)}")
    return 0


def _print_parts(console: Console, memory: RankMemory) -> None:
    rows = {**memory.parts(), "a rank at its peak": memory.total}
    width = max(map(len, rows))
    for name, size in rows.items():
        console.print(f"  {name:<{width}}  {_mb(size):>14}", markup=False)
    if memory.on_host:
        console.print(f"in the host's memory: optimizer {_mb(memory.on_host)}")
    console.print(
        f"beside that: KV cache of a sequence {_mb(memory.cache_a_sequence)}, a checkpoint on disk {_mb(memory.checkpoint)}, "
        f"the host's copies for saves in the background {_mb(memory.copies)}"
    )


def _in_words(plan: Plan) -> str:
    stages = f" × {plan.pipeline} ranks of a pipeline" if plan.pipeline > 1 else ""
    stages += f" × {plan.context} ranks that share each sequence" if plan.context > 1 else ""
    return (
        f"{plan.replicate} replicas × {plan.shard} shards × {plan.tensor} tensor ranks{stages}, "
        f"{plan.micro_batches} micro-batches of {plan.sequences} sequences"
    )


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def _gb(size: float) -> str:
    return f"{size / GIGABYTE:,.2f} GB"


def _free_memory() -> int:
    """Bytes that a process here can still have: the GPU's, or the machine's."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)
