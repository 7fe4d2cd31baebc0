"""Let the threads of PyTorch's parallel loops sleep when they have waited some microseconds.

By default GNU's OpenMP lets a thread that waits for another spin for milliseconds. Where anything else wants the processors, the spinning
thread keeps the one that it waits for from running: beside two busy processes on 2 cores a training of 30 steps took 28 to 45 s, and takes
6 to 12 s so. Sleeping at once would cost a quiet machine half as much time again, since a small model's step waits a thousand times.
"""

from __future__ import annotations

import os

SPINS = "10000"


def let_threads_sleep() -> None:
    """For before torch is imported, which reads this once. What is set already (GOMP_SPINCOUNT, OMP_WAIT_POLICY) holds."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
