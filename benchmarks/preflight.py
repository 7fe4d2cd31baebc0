"""The memory of a step as estimated by preflight, compared with the measured peak, for shapes small enough
to run here.

Each measurement is a fresh process that takes one step so that the optimizer's memory is allocated, resets
the kernel's high-water mark, and takes another. The result is that mark minus what the process held before.
glibc is configured to map every block above 64 kB separately, so that freed memory is returned. Linux only.
Pipelines are two ranks under torchrun; the rank with the larger error counts.

    python benchmarks/preflight.py
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from common import Figure, Target, finish, run_command

WITHIN = 0.15
MEGABYTE = 2**20
BASE = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "vocab_size": 8192,
    "max_position_embeddings": 1024,
}
LLAMA = {**BASE, "model_type": "llama", "num_key_value_heads": 4}
# name → shape, training, sequences, micro-batches
CONFIGURATIONS: dict[str, tuple[dict[str, Any], dict[str, Any], int, int]] = {
    "gpt2, fp32": (BASE, {"precision": "fp32"}, 4, 1),
    "gpt2, bf16, recomputed": ({**BASE, "gradient_checkpointing": True}, {"precision": "bf16"}, 8, 1),
    "gpt2, fp32, every 2nd block, muon": (
        {**BASE, "gradient_checkpointing": True, "activation_checkpoint_every": 2},
        {"precision": "fp32", "optimizer": "muon"},
        4,
        1,
    ),
    "gpt2, bf16, vocabulary 50k, 2 micro-batches": (
        {**BASE, "vocab_size": 50304},
        {"precision": "bf16"},
        4,
        2,
    ),
    "llama, bf16": (LLAMA, {"precision": "bf16"}, 4, 1),
    "llama, fp32, dense loss": ({**LLAMA, "vocab_size": 32000}, {"precision": "fp32", "loss": "dense"}, 2, 1),
}
STAGED = {**BASE, "hidden_size": 256, "vocab_size": 4096, "max_position_embeddings": 512}
# schedule and case → shape, training, sequences, micro-batches; on two ranks
PIPELINES: dict[str, tuple[dict[str, Any], dict[str, Any], int, int]] = {
    "gpipe, fp32, 8 micro-batches": (STAGED, {"precision": "fp32", "pipeline_schedule": "gpipe"}, 4, 8),
    "1f1b, fp32, 8 micro-batches": (STAGED, {"precision": "fp32", "pipeline_schedule": "1f1b"}, 4, 8),
    "interleaved, fp32, 8 micro-batches": (
        STAGED,
        {"precision": "fp32", "pipeline_schedule": "interleaved"},
        4,
        8,
    ),
    "1f1b, bf16, recomputed": (
        {**STAGED, "gradient_checkpointing": True, "vocab_size": 16384},
        {"precision": "bf16"},
        8,
        4,
    ),
}


def main() -> int:
    """Estimate, measure, print and write the results; return 1 if an estimate is off by more than 15 %."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", help="(internal) Run one measurement.")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return 0
    figures, targets = [], []
    for name in CONFIGURATIONS:
        estimated = estimate(name)
        command = [
            "env",
            "MALLOC_MMAP_THRESHOLD_=65536",
            f"PYTHONPATH={os.environ.get('PYTHONPATH', '')}",
            sys.executable,
            __file__,
        ]
        measured = json.loads(run_command([*command, "--measure", name]).output.splitlines()[-1])
        figures += [
            Figure(name, "measured", "MB", [round(measured)]),
            Figure(name, "estimated", "MB", [round(estimated)]),
        ]
        targets.append(
            Target(
                f"|estimated ÷ measured − 1|, {name}", abs(estimated / measured - 1), WITHIN, is_ceiling=True
            )
        )
    for name in PIPELINES:
        estimates, peaks = estimate_stages(name), measure_stages(name)
        for place, (estimated, measured) in enumerate(zip(estimates, peaks, strict=True)):
            work = f"{name}, rank {place}"
            figures += [
                Figure(work, "measured", "MB", [round(measured)]),
                Figure(work, "estimated", "MB", [round(estimated)]),
            ]
        off = max(abs(estimated / measured - 1) for estimated, measured in zip(estimates, peaks, strict=True))
        targets.append(Target(f"|estimated ÷ measured − 1|, {name}", off, WITHIN, is_ceiling=True))
    works = {figure.work: "measured" for figure in figures}
    return finish("preflight", figures, works, " ".join(["python", *sys.argv]), targets)


def estimate(name: str) -> float:
    """Estimate the megabytes of a step above what is held between steps."""
    from llm_trainer.config import ModelConfig, TrainingConfig
    from llm_trainer.training.memory.memory_estimator import step_memory

    shape, training, sequences, micro_batches = CONFIGURATIONS[name]
    return (
        step_memory(
            ModelConfig.model_validate(shape),
            TrainingConfig.model_validate(training),
            sequences=sequences,
            micro_batches=micro_batches,
        ).peak()
        / MEGABYTE
    )


def estimate_stages(name: str) -> list[float]:
    """Estimate the megabytes of a step on each rank of a pipeline, above what it holds between steps."""
    from llm_trainer.config import ModelConfig, TrainingConfig
    from llm_trainer.training.memory.pipeline_memory import pipeline_rank_memories

    shape, training, sequences, micro_batches = PIPELINES[name]
    places = pipeline_rank_memories(
        ModelConfig.model_validate(shape),
        TrainingConfig.model_validate(training),
        ranks=2,
        sequences=sequences,
        micro_batches=micro_batches,
    )
    return [max(map(sum, place.moments)) / MEGABYTE for place in places]


def measure_stages(name: str) -> list[float]:
    """Measure the same for a step on two ranks."""
    shape, training, sequences, micro_batches = PIPELINES[name]
    said = json.dumps([shape, {**training, "pipeline_parallel": 2}, sequences, micro_batches])
    environment = [
        "env",
        "MALLOC_MMAP_THRESHOLD_=65536",
        "OMP_NUM_THREADS=1",
        f"PYTHONPATH={os.environ.get('PYTHONPATH', '')}",
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    output = run_command(
        [*environment, *launcher, Path(__file__).parent / "workers/pipeline_memory.py", said]
    ).output
    return [peak / MEGABYTE for peak in json.loads(output.splitlines()[-1])]


def measure(name: str) -> float:
    """Measure the same for a step."""
    import torch

    from llm_trainer.config import ModelConfig, TrainingConfig
    from llm_trainer.diagnostics.measure_memory import measure_step_memory

    shape, training, sequences, micro_batches = CONFIGURATIONS[name]
    torch.manual_seed(0)
    return (
        measure_step_memory(
            ModelConfig.model_validate(shape),
            TrainingConfig.model_validate(training),
            sequences,
            micro_batches,
        )
        / MEGABYTE
    )


if __name__ == "__main__":
    sys.exit(main())
