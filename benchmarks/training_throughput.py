"""Tokens per second of a training step (forward, backward, clipping, AdamW), compared with transformers,
LitGPT and nanoGPT, for three shapes.

Every contestant is a separate process that builds, compiles and warms up once and then waits; rounds
alternate between them. Each library runs eager in fp32, which is its default, eager in bf16 autocast, and
compiled in bf16; the ratios compare the best of ours with the best of each peer. nanoGPT runs as in its
README on a CPU, fp32 and eager, if `--nanogpt` names its clone. LitGPT cannot be installed next to our
version of huggingface-hub, so it has its own environment, .venv-peers (docs/reference/benchmarks.md
explains how to create it).

Compilation time is not included: the figures are the steady state of a long run. Short runs are measured by
`time_to_loss.py`.

    python benchmarks/training_throughput.py [--rounds 5] [--shapes 0.8M,10.7M,vocabulary-50k]
        [--nanogpt DIR] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from common import Figure, Target, alternate, finish, report_load
from workers.shapes import SHAPES, Shape

HERE = Path(__file__).resolve().parent
PEERS_PYTHON = HERE.parent / ".venv-peers" / "bin" / "python"
PEERS = ("transformers", "LitGPT")
FP32, BF16, COMPILED = ("--precision", "fp32"), ("--precision", "bf16"), ("--precision", "bf16", "--compile")
WAYS = {"fp32": FP32, "bf16": BF16, "bf16 compiled": COMPILED}
WHOLE_SCORES = (
    "--attention",
    "eager",
)  # transformers' name for attention with plain products: faster than the fused kernel in bf16 on CPUs
MORE_WAYS = {
    "transformers": {
        "bf16 eager attention": (*BF16, *WHOLE_SCORES),
        "bf16 eager attention compiled": (*COMPILED, *WHOLE_SCORES),
    }
}
WANTED, WANTED_OF_NANOGPT = 1.2, 3.0
ROUND_SECONDS = 2.0


def main() -> int:
    """Measure, print and write the results; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="A clone of nanoGPT, to include it.")
    parser.add_argument("--quick", action="store_true", help="nothing is compiled")
    options = parser.parse_args()
    notes = [report_load()]
    if not PEERS_PYTHON.exists():
        notes.append("LitGPT was skipped: there is no .venv-peers.")
    figures: list[Figure] = []
    for name in options.shapes.split(","):
        figures += measure(name, options.quick, options.rounds, options.nanogpt, notes)
    baselines = {figure.work: "transformers, fp32" for figure in figures}
    return finish(
        "training_throughput", figures, baselines, " ".join(["python", *sys.argv]), _targets(figures), notes
    )


def measure(name: str, is_quick: bool, rounds: int, nanogpt: Path | None, notes: list[str]) -> list[Figure]:
    """Measure all contestants on one shape; those that fail to start are reported and skipped."""
    shape = SHAPES[name]
    commands = {
        name: words for name, words in _commands(nanogpt).items() if not (is_quick and "--compile" in words)
    }
    workers: dict[str, Worker] = {}
    try:
        for contestant, command in commands.items():
            worker = Worker.start([*command, "--shape", name], nanogpt)
            if worker is None:
                notes.append(f"{contestant} failed on {shape.in_words}")
                continue
            print(
                f"{name}: {contestant} is ready after {worker.ready_seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            workers[contestant] = worker
        timed = {
            contestant: (lambda worker=worker: worker.tokens_per_second(shape))
            for contestant, worker in workers.items()
        }
        measured = alternate(timed, rounds)
    finally:
        for worker in workers.values():
            worker.process.kill()
    return [Figure(shape.in_words, contestant, "tokens/s", rates) for contestant, rates in measured.items()]


def _commands(nanogpt: Path | None) -> dict[str, list[str]]:
    """Return each contestant's command without the shape."""
    libraries = {
        "ours": (sys.executable, "ours.py"),
        "transformers": (sys.executable, "transformers_gpt2.py"),
    }
    if PEERS_PYTHON.exists():
        libraries["LitGPT"] = (str(PEERS_PYTHON), "litgpt_gpt.py")
    commands = {
        f"{library}, {way}": [python, str(HERE / "workers" / file), *words]
        for library, (python, file) in libraries.items()
        for way, words in {**WAYS, **MORE_WAYS.get(library, {})}.items()
    }
    if nanogpt is not None:
        commands["nanoGPT, fp32"] = [sys.executable, str(HERE / "workers" / "nanogpt.py"), *FP32]
    return commands


@dataclass
class Worker:
    """A process that runs training steps on request."""

    process: subprocess.Popen[str]
    ready_seconds: float
    steps: int = 0

    @classmethod
    def start(cls, command: list[str], nanogpt: Path | None) -> Worker | None:
        """Start a worker and wait until it is ready; return None if it failed."""
        environment = {**os.environ, **({"NANOGPT": str(nanogpt.resolve())} if nanogpt else {})}
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        answer = _answer(process)
        return None if answer is None else cls(process, answer["ready_seconds"])

    def tokens_per_second(self, shape: Shape) -> float:
        """Run one round; the first determines the number of steps per round."""
        if self.steps == 0:
            self.steps = max(2, min(200, round(2 * ROUND_SECONDS / self._seconds(2))))
        return self.steps * shape.tokens / self._seconds(self.steps)

    def _seconds(self, steps: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        answer = _answer(self.process)
        if answer is None:
            raise RuntimeError(f"{self.process.args} ended during a round")
        return answer["seconds"]


def _answer(process: subprocess.Popen[str]) -> dict[str, float] | None:
    """Return the next answer in the process's output; None at its end."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("answer "):
            answer: dict[str, float] = json.loads(line.removeprefix("answer "))
            return answer
    return None


def _targets(figures: list[Figure]) -> list[Target]:
    """Return the best of ours ÷ the best of each peer, by shape."""
    best: dict[tuple[str, str], float] = {}
    for figure in figures:
        key = (figure.work, figure.contestant.split(",")[0])
        best[key] = max(best.get(key, 0.0), figure.median)
    targets = []
    for (work, library), rate in best.items():
        if library in PEERS:
            targets.append(
                Target(f"{work}: best of ours ÷ best of {library}", best[work, "ours"] / rate, WANTED)
            )
        elif library == "nanoGPT":
            targets.append(
                Target(f"{work}: best of ours ÷ nanoGPT", best[work, "ours"] / rate, WANTED_OF_NANOGPT)
            )
    return targets


if __name__ == "__main__":
    sys.exit(main())
