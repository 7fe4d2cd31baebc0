"""Settings of the whole process that make PyTorch on a CPU start and run faster. None of them changes a
result.

| what | measured gain | off |
|---|---|---|
| waiting OpenMP threads sleep | next to two busy processes: 3 to 4 times | `OMP_WAIT_POLICY=active` |
| freed memory is kept for the next step | a sixth of a step of a 0.8 M model | `LLM_TRAINER_KEEP_MEMORY=0` |
| rarer garbage collection during imports | 0.15 s of start-up | `LLM_TRAINER_GC=default` |

`replace_unencodable_output` is about terminals: a character that their encoding lacks is printed as `?`.
"""

from __future__ import annotations

import ctypes
import gc
import io
import os
import sys

SPINS = "10000"
_GARBAGE_THRESHOLDS = (50_000, 20, 20)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt's parameters in malloc.h
_KEPT_BYTES = 2**31 - 1
_LARGEST_BYTES = 2**25  # larger blocks are always mapped one by one; glibc allows no higher threshold


def before_imports() -> None:
    """Apply what has to be set before torch is imported."""
    let_threads_sleep()
    if os.environ.get("LLM_TRAINER_GC") != "default":
        # Imports create a million objects that are not garbage.
        gc.set_threshold(*_GARBAGE_THRESHOLDS)


def replace_unencodable_output() -> None:
    """Let stdout and stderr print `?` for characters that their encoding lacks, instead of ending the
    command.

    A stream that escapes them, as stderr does by default, continues to do so.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def let_threads_sleep() -> None:
    """Let the threads of PyTorch's parallel loops sleep after they have waited for some microseconds.

    By default GNU's OpenMP lets a thread that waits for another spin for milliseconds. Where anything else
    wants the processors, the spinning thread keeps the one that it waits for from running: next to two busy
    processes on 2 cores a training of 30 steps took 28 to 45 s, and takes 6 to 12 s with this. Sleeping at
    once would make a quiet machine half as slow again, since a step of a small model waits a thousand times.
    GOMP_SPINCOUNT and OMP_WAIT_POLICY are left alone where they are set. torch reads them once, when it is
    imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def keep_freed_memory() -> bool:
    """Let glibc keep the memory that a training step frees for the next step.

    A step on a CPU allocates and frees the same large tensors again and again. By default glibc returns them
    to the kernel each time, and the next step pays for fresh, zeroed pages: 5,000 page faults per step of a
    0.8 M model, a sixth of its time. With these two thresholds there are none. The process then keeps its
    peak memory, which it would reach again in the next step anyway.

    Returns:
        Whether the thresholds were set; other C libraries have none.
    """
    if not sys.platform.startswith("linux") or os.environ.get("LLM_TRAINER_KEEP_MEMORY") == "0":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_BYTES)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT_BYTES))
