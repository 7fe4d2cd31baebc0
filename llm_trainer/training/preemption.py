"""Stop signals: a cluster's SIGTERM or SIGUSR1, a closed terminal's SIGHUP, or Ctrl-C sets a flag that the
loop reads after each step.

The handler does not touch the run, so a signal during a step, a save or a validation lets that finish. The
checkpoint that follows is one that an uninterrupted run would also have passed through. A second signal exits
at once, which is safe at any moment because saves are atomic.

SIGHUP is special in three ways. A closing terminal sends it several times, and torchrun answers it with a
SIGTERM, so neither counts as a second signal. Whoever ignores it, as `nohup` does, continues to. And what the
run prints may have nowhere to go any more, which must not cost the checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import threading
from types import FrameType, TracebackType

# EX_TEMPFAIL of sysexits: nothing is wrong, and the job should be started again. Cluster managers can requeue
# on it.
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 128 + signal.SIGINT

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
HANGUP = getattr(signal, "SIGHUP", None)  # None on Windows


class StopSignals:
    """A context in which the first SIGTERM, SIGUSR1, SIGHUP or SIGINT sets `received`. The second one exits
    at once with code 128 + its number; after a SIGHUP it is the third one, and further SIGHUPs do nothing.

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
            numbers = [*STOP_SIGNALS]
            if HANGUP is not None and signal.getsignal(HANGUP) != signal.SIG_IGN:
                numbers.append(HANGUP)
            self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == HANGUP:
            _discard_lost_output()
            self.received = self.received or signal.Signals(number)
            return
        if self.received not in (None, HANGUP):
            os._exit(128 + number)
        self.received = signal.Signals(number)


def _discard_lost_output() -> None:
    """Let stdout and stderr lead nowhere if they are a terminal or a pipe.

    After a hang-up a write to the closed terminal fails, and so does one to a pipe whose reader, such as
    `tee`, got the same signal. The lines are in `logs/train.log` all the same. A file is still written.
    """
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            kind = os.fstat(descriptor).st_mode
            if stat.S_ISCHR(kind) or stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
