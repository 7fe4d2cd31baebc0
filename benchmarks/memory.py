"""Peak memory of one training step with a vocabulary of 50,304: the chunked cross-entropy compared with the
dense one.

The shape is the third of the training benchmarks: 6 layers, width 256, 50,304 tokens untied, 4 sequences of
512, 30.6 M parameters, AdamW. Each measurement is a fresh process that takes one step so that the memory of
gradients and optimizer is allocated, resets the kernel's high- water mark, and takes another. "Step" is
that mark minus what the process held before (weights, AdamW's state, libraries); "process" is the mark
itself. Linux only.

    python benchmarks/memory.py [--rounds 3] [--precisions fp32,bf16]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from common import Figure, Target, alternate, finish, run_command

LIMIT = 0.6
LOSSES = ("dense", "chunked")
MEGABYTE = 2**20


def main() -> int:
    """Measure, print and write the results; return 1 if the target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--measure", metavar="LOSS,PRECISION", help="(internal) Run one measurement.")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure.split(","))))
        return 0
    figures: list[Figure] = []
    targets: list[Target] = []
    for precision in options.precisions.split(","):
        rounds = _rounds(precision, options.rounds)
        for what in ("step", "process"):
            own = [
                Figure(f"{what}, {precision}", loss, "MB", [round(one[what]) for one in rounds[loss]])
                for loss in LOSSES
            ]
            figures += own
            if what == "step":
                targets.append(
                    Target(
                        f"chunked ÷ dense, {precision}", own[1].median / own[0].median, LIMIT, is_ceiling=True
                    )
                )
    baselines = {figure.work: "dense" for figure in figures}
    return finish("memory", figures, baselines, " ".join(["python", *sys.argv]), targets)


def _rounds(precision: str, count: int) -> dict[str, list[dict[str, float]]]:
    """Measure each loss in fresh processes."""
    kept: dict[str, list[dict[str, float]]] = {loss: [] for loss in LOSSES}

    def one(loss: str) -> float:
        done = run_command([sys.executable, __file__, "--measure", f"{loss},{precision}"])
        kept[loss].append(json.loads(done.output.splitlines()[-1]))
        return kept[loss][-1]["step"]

    alternate({loss: (lambda loss=loss: one(loss)) for loss in LOSSES}, count)
    return kept


def measure(loss: str, precision: str) -> dict[str, float]:
    """Return the peak megabytes of one step, above the baseline and in total."""
    from workers.ours import Steps
    from workers.shapes import SHAPES

    steps = Steps(SHAPES["vocabulary-50k"], precision, compile="off", loss=loss)
    steps.run(1)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset the high-water mark
    steps.run(1)
    peak = _status("VmHWM")
    return {"step": (peak - before) / MEGABYTE, "process": peak / MEGABYTE}


def _status(name: str) -> float:
    """Return a line of /proc/self/status, in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return 1024.0 * int(found[1])


if __name__ == "__main__":
    sys.exit(main())
