"""Where a step's time goes: seconds of forward, backward, optimizer, data, evaluation, saving and operations.

On a GPU the host runs ahead of the device, so what lies on the device is timed by events that are put into
its queue and read when the run reports, where the host waits anyway: measuring makes nobody wait. Elsewhere
the clock is enough.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

ON_DEVICE = ("forward", "backward", "optimizer")  # the rest is the host's
_MOST_EVENTS = 512  # read, and with that waited for, when nobody asked for so long


class Timings:
    """Seconds by what they were spent on, since the last reading and in all."""

    def __init__(self, device: torch.device) -> None:
        self._uses_events = device.type == "cuda"
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._recent: dict[str, float] = {}
        self._steps = 0
        self.totals: dict[str, float] = {}

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Count the time within as `what`."""
        if self._uses_events and what in ON_DEVICE:
            first, last = _event(), _event()
            first.record()
            yield
            last.record()
            self._events.append((what, first, last))
            if len(self._events) >= _MOST_EVENTS:
                self._settle()
            return
        start = time.perf_counter()
        yield
        self._add(what, time.perf_counter() - start)

    def step_done(self) -> None:
        """One more step."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """`time/<what>`: seconds a step since the last reading; starts anew."""
        self._settle()
        steps = max(1, self._steps)
        seconds = {f"time/{what}": seconds / steps for what, seconds in self._recent.items()}
        self._recent, self._steps = {}, 0
        return seconds

    def describe(self) -> str:
        """`forward 34 %, backward 52 %, …`: shares of all that was timed, the largest first; empty before
        anything was.
        """
        self._settle()
        whole = sum(self.totals.values())
        ordered = sorted(self.totals.items(), key=lambda item: -item[1])
        return (
            ", ".join(
                f"{what} {seconds / whole:.0%}" for what, seconds in ordered if seconds >= 0.005 * whole
            )
            if whole
            else ""
        )

    def _settle(self) -> None:
        for what, first, last in self._events:
            last.synchronize()
            self._add(what, first.elapsed_time(last) / 1e3)
        self._events.clear()

    def _add(self, what: str, seconds: float) -> None:
        self._recent[what] = self._recent.get(what, 0.0) + seconds
        self.totals[what] = self.totals.get(what, 0.0) + seconds


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
