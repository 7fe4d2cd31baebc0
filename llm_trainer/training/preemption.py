"""Stop signals: a cluster's SIGTERM or SIGUSR1, or Ctrl-C, sets a flag that the loop reads after each step.

The handler does nothing else, so a signal during a step, a save or a validation lets that finish. The
checkpoint that follows is one that an uninterrupted run would also have passed through. A second signal exits
at once, which is safe at any moment because saves are atomic.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

# EX_TEMPFAIL of sysexits: nothing is wrong, and the job should be started again. Cluster managers can requeue
# on it.
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 128 + signal.SIGINT

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """A context in which the first SIGTERM, SIGUSR1 or SIGINT sets `received`. The second one exits at once
    with code 128 + its number.

    Handlers can only be set in a process's main thread. In another thread the context does nothing.

    Attributes:
        received: The signal; None so far.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    @property
    def stop_requested(self) -> bool:
        """Whether a signal was received."""
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """The process's exit code after a graceful stop: 0 without a signal, 130 after Ctrl-C, else
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
