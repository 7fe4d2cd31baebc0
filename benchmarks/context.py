"""One long sequence on two ranks compared with one (`context_parallel`): tokens per second and memory, with
one core per rank.

A Llama-like network (4 layers, width 256, 8 heads with 2 for keys and values, 3.1 M parameters) trains on
one sequence of 4096 tokens per step. Each measurement is a fresh `torchrun`. Memory is the first rank's
peak above what the process held before it had the model (a tiny model was trained first, so that all
libraries are loaded), next to the estimate of `llm-trainer preflight`. The estimate does not include blocks
that glibc keeps after they are freed, a fifth here: with MALLOC_MMAP_THRESHOLD_=65536, as in
benchmarks/preflight.py, they agree within 8 %. Linux only.

    python benchmarks/context.py [--rounds 3] [--steps 3] [--tokens 4096] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from common import Figure, alternate, finish, report_load, run_command

if TYPE_CHECKING:
    from llm_trainer.config import ModelConfig, TrainingConfig

WARM_UP = 2
MEGABYTE = 2**20


def main() -> int:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096, help="of the sequence")
    parser.add_argument("--quick", action="store_true", help="one round of one step, 2048 tokens")
    parser.add_argument(
        "--measure",
        metavar="FILE",
        help="(internal) Write one measurement to this file.",
    )
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps, options.tokens = 1, 1, 2048
    if options.measure:
        measure(options.tokens, options.steps, Path(options.measure))
        return 0
    if (os.cpu_count() or 1) < 2:
        print("two ranks need two cores; this machine has one")
        return 0
    load = report_load()
    memory: dict[int, list[float]] = {1: [], 2: []}

    def rate(ranks: int) -> float:
        found = _measured(ranks, options.tokens, options.steps)
        memory[ranks].append(found["memory"] / MEGABYTE)
        return found["rate"]

    work = f"one sequence of {options.tokens} tokens, fp32"
    rates = alternate({_named(ranks): (lambda n=ranks: rate(n)) for ranks in memory}, options.rounds)
    figures = [
        Figure(f"speed, {work}", name, "tokens/s", [round(one, 1) for one in found])
        for name, found in rates.items()
    ]
    figures += [
        Figure(f"memory of a rank, {work}", _named(ranks), "MB", found) for ranks, found in memory.items()
    ]
    for ranks in memory:
        figures.append(
            Figure(
                f"expected memory of a rank, {work}",
                _named(ranks),
                "MB",
                [_expected(options.tokens, ranks) / MEGABYTE],
            )
        )
    baselines = {figure.work: _named(1) for figure in figures}
    return finish("context", figures, baselines, " ".join(["python", *sys.argv]), [], [load])


def _named(ranks: int) -> str:
    return f"{ranks} rank{'s' * (ranks > 1)}"


def _measured(ranks: int, tokens: int, steps: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "measured.json"
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
        ]
        run_command([*launcher, __file__, "--measure", file, "--tokens", str(tokens), "--steps", str(steps)])
        found: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
        return found


def _settings(tokens: int, ranks: int) -> tuple[ModelConfig, TrainingConfig]:
    from llm_trainer.config import ModelConfig, TrainingConfig

    shape = ModelConfig(
        model_type="llama",
        vocab_size=256,
        hidden_size=256,
        num_layers=4,
        num_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=tokens,
    )
    return shape, TrainingConfig(device="cpu", precision="fp32", compile="off", context_parallel=ranks)


def _expected(tokens: int, ranks: int) -> float:
    """Return the estimated memory of a rank."""
    from llm_trainer.config.resolve.batch_size import BatchPlan
    from llm_trainer.config.resolve.parallelism import ParallelPlan
    from llm_trainer.diagnostics.memory_plan import rank_memory

    return rank_memory(*_settings(tokens, ranks), ParallelPlan(context_parallel=ranks), BatchPlan(1, 1)).total


def measure(length: int, steps: int, file: Path) -> None:
    """Measure tokens per second over all ranks and the memory of a step; the main rank writes them."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"])]})
    import torch

    torch.set_num_threads(1)
    from llm_trainer.config.environment import launch_environment
    from llm_trainer.data.sampling.batch import Batch
    from llm_trainer.distributed.context_parallel import shard_batch
    from llm_trainer.distributed.process_group import init_process_group
    from llm_trainer.model.transformer import Transformer
    from llm_trainer.training.engines.engine import build_engine

    launch = launch_environment()
    _, training = _settings(length, launch.world_size)

    with init_process_group(launch, training) as process_group:

        def train(length: int, steps: int) -> float:
            """Return the seconds of the given number of steps, after the first ones."""
            model = Transformer(
                _settings(length, process_group.world_size)[0], torch.Generator().manual_seed(0)
            ).train()
            engine = build_engine(model, training, None, process_group, torch.device("cpu"))
            engine.start("fp32", "off")
            ids = torch.randint(256, (1, length + 1), generator=torch.Generator().manual_seed(1))
            batch = shard_batch(
                Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None, length), process_group
            )
            for index in range(WARM_UP + steps):
                if index == WARM_UP:
                    process_group.barrier()
                    begun = time.perf_counter()
                engine.step([batch], length, lr_factor=1.0, index=index)
            process_group.barrier()
            return time.perf_counter() - begun

        train(8, 1)  # loads libraries
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset the high-water mark
        seconds = train(length, steps)
        if process_group.is_main:
            file.write_text(
                json.dumps({"rate": steps * length / seconds, "memory": _status("VmHWM") - before}),
                encoding="utf-8",
            )


def _status(name: str) -> float:
    """Return a line of /proc/self/status, in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return 1024.0 * int(found[1])


if __name__ == "__main__":
    sys.exit(main())
