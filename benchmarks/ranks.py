"""Tokens per second on two ranks compared with one: the step of the training engine (DDP with gloo), with
one core per rank.

The shape is the 10.7 M one of the training benchmarks (6 layers, width 384, context 256, 16 sequences per
micro-batch and rank), so two ranks do twice the work of one in a step. Each measurement is a fresh
`torchrun`. The single rank is pinned to one core with one thread, too, as are the two. With accumulation, a
rank communicates its gradients once for several micro-batches.

    python benchmarks/ranks.py [--rounds 3] [--precisions fp32,bf16] [--accumulation 1,4] [--quick]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from common import Figure, Target, alternate, finish, report_load, run_command

WANTED = 1.7
WARM_UP = 2


def main() -> int:
    """Measure, print and write the results; return 1 if the target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--accumulation", default="1,4")
    parser.add_argument("--quick", action="store_true", help="Run one round in fp32 without accumulation.")
    parser.add_argument(
        "--measure",
        nargs=4,
        metavar=("PRECISION", "ACCUMULATION", "STEPS", "FILE"),
        help="(internal) Used by the processes that this program starts.",
    )
    options = parser.parse_args()
    if options.measure:
        precision, accumulation, steps, file = options.measure
        measure(precision, int(accumulation), int(steps), Path(file))
        return 0
    if (os.cpu_count() or 1) < 2:
        print("two ranks need two cores; this machine has one")
        return 0
    load = report_load()
    precisions, accumulations = ("fp32", "1") if options.quick else (options.precisions, options.accumulation)
    figures: list[Figure] = []
    targets: list[Target] = []
    for precision in precisions.split(","):
        for accumulation in accumulations.split(","):
            work = (
                f"10.7 M, {precision}, {accumulation} micro-batch{'es' if accumulation != '1' else ''} a step"
            )
            steps = max(2, options.steps // int(accumulation))
            timed = {
                f"{ranks} rank{'s' * (ranks > 1)}": functools.partial(
                    _rate, ranks, precision, accumulation, steps
                )
                for ranks in (1, 2)
            }
            measured = alternate(timed, 1 if options.quick else options.rounds)
            figures += [
                Figure(work, name, "tokens/s", [round(rate, 1) for rate in rates])
                for name, rates in measured.items()
            ]
            targets.append(
                Target(
                    f"2 ranks ÷ 1, {precision}, accumulation {accumulation}",
                    figures[-1].median / figures[-2].median,
                    WANTED,
                )
            )
    return finish(
        "ranks",
        figures,
        {figure.work: "1 rank" for figure in figures},
        " ".join(["python", *sys.argv]),
        targets,
        [load],
    )


def _rate(ranks: int, precision: str, accumulation: str, steps: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rate.json"
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
        ]
        run_command([*launcher, __file__, "--measure", precision, accumulation, str(steps), file])
        return float(json.loads(file.read_text(encoding="utf-8")))


def measure(precision: str, accumulation: int, steps: int, file: Path) -> None:
    """Measure tokens per second over all ranks; the main rank writes them."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"])]})
    import torch

    torch.set_num_threads(1)
    from workers.ours import model_config
    from workers.shapes import SHAPES

    from llm_trainer.cli.runtime_env import keep_freed_memory
    from llm_trainer.config import TrainingConfig
    from llm_trainer.config.environment import launch_environment
    from llm_trainer.data.sampling.batch import Batch
    from llm_trainer.distributed.process_group import init_process_group
    from llm_trainer.model.transformer import Transformer
    from llm_trainer.training.engines.engine import build_engine

    keep_freed_memory()
    shape = SHAPES["10.7M"]
    training = TrainingConfig(device="cpu", precision=precision, compile="off")
    with init_process_group(launch_environment(), training) as process_group:
        model = Transformer(model_config(shape), torch.Generator().manual_seed(0)).train()
        engine = build_engine(model, training, None, process_group, torch.device("cpu"))
        engine.start(precision, "off")  # type: ignore[arg-type]
        ids = torch.randint(
            shape.vocabulary,
            (shape.batch, shape.context + 1),
            generator=torch.Generator().manual_seed(1 + process_group.rank),
        )
        batches = [
            Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None, shape.tokens)
        ] * accumulation
        tokens = shape.tokens * accumulation * process_group.world_size
        for index in range(WARM_UP + steps):
            if index == WARM_UP:
                process_group.barrier()
                begun = time.perf_counter()
            engine.step(batches, tokens, lr_factor=1.0, index=index)
        process_group.barrier()
        if process_group.is_main:
            file.write_text(json.dumps(steps * tokens / (time.perf_counter() - begun)), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
