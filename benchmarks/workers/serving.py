"""A worker's side of the talk: it says when it is ready, then takes so many steps as each line of its input says and answers with seconds.

It stays alive between rounds, so that contestants alternate without compiling anew, and waits without spinning.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

from workers.shapes import SHAPES, Shape

Run = Callable[[int], None]  # so many training steps


def serve(build: Callable[[Shape, str, bool], Run], warm_steps: int = 3) -> None:
    """Build what `--shape --precision --compile` say, warm up, answer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16"), required=True)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    begun = time.perf_counter()
    run = build(SHAPES[options.shape], options.precision, options.compile)
    run(warm_steps)
    _answer({"ready_seconds": time.perf_counter() - begun})
    for line in sys.stdin:
        begun = time.perf_counter()
        run(int(line))
        _answer({"seconds": time.perf_counter() - begun})


def _answer(content: dict[str, float]) -> None:
    print("answer", json.dumps(content), flush=True)
