"""The worker's side of the protocol: it reports when it is ready, then runs the number of steps that each
line of its input requests, and answers with the seconds.

It stays alive between rounds, so that contestants alternate without compiling again, and waits without
spinning.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from workers.shapes import SHAPES, Shape

Run = Callable[[int], None]  # runs this many training steps


@dataclass(frozen=True)
class Request:
    """What a worker builds; `attention` is the library's name for an implementation (empty: its default)."""

    shape: Shape
    precision: str
    compiled: bool
    attention: str


def serve(build: Callable[[Request], Run], warm_steps: int = 3) -> None:
    """Build what the command line requests, warm up, and answer requests."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16"), required=True)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--attention", default="")
    options = parser.parse_args()
    begun = time.perf_counter()
    run = build(Request(SHAPES[options.shape], options.precision, options.compile, options.attention))
    run(warm_steps)
    _answer({"ready_seconds": time.perf_counter() - begun})
    for line in sys.stdin:
        begun = time.perf_counter()
        run(int(line))
        _answer({"seconds": time.perf_counter() - begun})


def _answer(content: dict[str, float]) -> None:
    print("answer", json.dumps(content), flush=True)
