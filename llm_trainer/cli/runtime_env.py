"""What a command sets for its whole process, so that PyTorch on a CPU runs as fast as it can and every
terminal can be told.

None of it changes a result.
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
_LARGEST_BYTES = 2**25  # blocks above are mapped one by one whatever is said; glibc allows no more


def before_imports() -> None:
    """For before torch is imported."""
    let_threads_sleep()
    gc.set_threshold(
        *_GARBAGE_THRESHOLDS
    )  # imports make a million objects that are no garbage: 0.15 s of looking for it saved


def replace_what_streams_lack() -> None:
    """Let stdout and stderr write `?` for what their encoding lacks, instead of ending the command at the
    first such character.

    A stream that escapes them, as stderr does by default, goes on doing so, and one that cannot be set so is
    left alone.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def let_threads_sleep() -> None:
    """Let the threads of PyTorch's parallel loops sleep when they have waited some microseconds.

    By default GNU's OpenMP lets a thread that waits for another spin for milliseconds. Where anything else
    wants the processors, the spinning thread keeps the one that it waits for from running: beside two busy
    processes on 2 cores a training of 30 steps took 28 to 45 s, and takes 6 to 12 s so. Sleeping at once
    would cost a quiet machine half as much time again, since a small model's step waits a thousand times.
    What is set already (GOMP_SPINCOUNT, OMP_WAIT_POLICY) holds; torch reads it once, when it is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def keep_freed_memory() -> bool:
    """Let glibc keep the memory that a training step frees, for the next step; returns whether the C library
    is one that can.

    A step on a CPU allocates and frees the same large tensors again and again. By default glibc gives them
    back to the kernel each time, and the next step pays for fresh, zeroed pages: 5,000 page faults a step of
    a 0.8 M model, a sixth of its time. With these two thresholds there are none. The process then keeps its
    peak, which it would reach again in the next step anyway.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_BYTES)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT_BYTES))
