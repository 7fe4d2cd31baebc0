"""Progress of data preparation.

On a terminal, a bar appears once something takes longer than two seconds. Elsewhere, such as in a log file, a
plain line is printed every ten seconds.
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_SHOW_AFTER_SECONDS = 2.0
_PLAIN_EVERY_SECONDS = 10.0


class ByteProgress:
    """Shows how many bytes of a task are done; a context manager.

    Args:
        console: Where progress is shown; None shows nothing.
        description: The name of the task.
        total: Bytes of the entire task; None if it is unknown.
    """

    def __init__(self, console: Console | None, description: str, total: int | None) -> None:
        self._console, self._description, self._total = console, description, total
        self._done = 0
        self._bar: Progress | None = None

    def __enter__(self) -> ByteProgress:
        self._started = self._last_line = time.monotonic()
        return self

    def advance(self, count: int) -> None:
        """Add `count` bytes to those that are done, and refresh what is shown."""
        self._done += count
        now = time.monotonic()
        if self._console is None or now - self._started < _SHOW_AFTER_SECONDS:
            return
        if self._console.is_terminal:
            self._bar = self._bar or self._start_bar()
            self._bar.update(self._bar.task_ids[0], completed=self._done)
        elif now - self._last_line >= _PLAIN_EVERY_SECONDS:
            self._last_line = now
            self._console.print(self._line(now - self._started), highlight=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _line(self, seconds: float) -> str:
        rate = self._done / seconds
        of, left = (
            (f" of {self._total / 1e6:.1f}", f", {max(0, self._total - self._done) / rate:.0f} s left")
            if self._total
            else ("", "")
        )
        return f"{self._description}: {self._done / 1e6:.1f}{of} MB, {rate / 1e6:.1f} MB/s{left}"

    def _start_bar(self) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        bar = Progress(*columns, console=self._console, transient=True)
        bar.add_task(self._description, total=self._total)
        bar.start()
        return bar
