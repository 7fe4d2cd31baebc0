"""Measures where the time goes: forward, backward, optimizer, data, evaluation, saving and operations.

On a GPU the host runs ahead of the device, so work on the device is timed by CUDA events. They are read when
the run logs, where the host synchronises anyway, so measuring adds no wait. Elsewhere the clock is enough.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

ON_DEVICE = ("forward", "backward", "optimizer")  # the other phases run on the host
_MAX_EVENTS = 512  # events are read, which synchronises, when this many are pending


class StepTimers:
    """Measures seconds by phase, since the last reading and in total."""

    def __init__(self, device: torch.device) -> None:
        self._uses_events = device.type == "cuda"
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._recent: dict[str, float] = {}
        self._steps = 0
        self.totals: dict[str, float] = {}

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Count the time within the context as a phase."""
        if self._uses_events and phase in ON_DEVICE:
            first, last = _event(), _event()
            first.record()
            yield
            last.record()
            self._events.append((phase, first, last))
            if len(self._events) >= _MAX_EVENTS:
                self._read_events()
            return
        start = time.perf_counter()
        yield
        self._add(phase, time.perf_counter() - start)

    def step_done(self) -> None:
        """Count a step."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Return `time/<phase>`, the seconds per step, and start a new interval."""
        self._read_events()
        steps = max(1, self._steps)
        seconds = {f"time/{phase}": seconds / steps for phase, seconds in self._recent.items()}
        self._recent, self._steps = {}, 0
        return seconds

    def describe(self) -> str:
        """Return the fraction of each phase, like `forward 34 %, backward 52 %`, largest first.

        Empty before anything has been measured.
        """
        self._read_events()
        total = sum(self.totals.values())
        ordered = sorted(self.totals.items(), key=lambda item: -item[1])
        return (
            ", ".join(
                f"{phase} {seconds / total:.0%}" for phase, seconds in ordered if seconds >= 0.005 * total
            )
            if total
            else ""
        )

    def _read_events(self) -> None:
        for phase, first, last in self._events:
            last.synchronize()
            self._add(phase, first.elapsed_time(last) / 1e3)
        self._events.clear()

    def _add(self, phase: str, seconds: float) -> None:
        self._recent[phase] = self._recent.get(phase, 0.0) + seconds
        self.totals[phase] = self.totals.get(phase, 0.0) + seconds


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
