"""A worker's side of the talk: it says when it is ready, then takes so many steps as each line of its input
says and answers with seconds.

It stays alive between rounds, so that contestants alternate without compiling anew, and waits without
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

Run = Callable[[int], None]  # so many training steps


@dataclass(frozen=True)
class Request:
    """What a worker is to build; `attention` is a library's own name for a way of computing it, its default
    where empty.
    """

    shape: Shape
    precision: str
    compiled: bool
    attention: str


def serve(build: Callable[[Request], Run], warm_steps: int = 3) -> None:
    """Build what the command line says, warm up, answer."""
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
