"""Leaving when told to: a cluster's SIGTERM or SIGUSR1, or Ctrl-C, becomes a flag that the loop reads at a
step's edge.

Nothing is done in the handler but setting the flag, so a signal in the middle of a step, a save or a
validation lets that finish: the checkpoint that follows is one that an uninterrupted run would also have
passed through. A second signal means "now" and exits at once, which is safe at any moment because saves are
atomic.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

# sysexits' EX_TEMPFAIL: nothing is wrong, start me again. Cluster managers can requeue on it.
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 128 + signal.SIGINT

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """While entered, the first SIGTERM, SIGUSR1 or SIGINT sets `received`; the second leaves at once with 128
    + its number.

    Handlers can only be set in a process's main thread; elsewhere entering does nothing, and signals keep
    their meaning.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    @property
    def stop_requested(self) -> bool:
        """Whether a signal has come."""
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """The process's exit status after a graceful stop: 0 without a signal, 130 after Ctrl-C, else
        EXIT_PREEMPTED.
        """
        if self.received is None:
            return 0
        return EXIT_INTERRUPTED if self.received == signal.SIGINT else EXIT_PREEMPTED

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number)
