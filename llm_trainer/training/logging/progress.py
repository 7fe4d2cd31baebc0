"""What a person sees while a run goes on: a bar on a terminal, plain lines off it, and the same lines in
`logs/train.log`.

Only the main rank makes one of these, so one rank logs. Text from outside (paths, names, samples) is cleaned
of control characters first: a line break in a run's name must not forge a line of the log, an escape sequence
must not redraw the terminal.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from llm_trainer.run_dir import LOGS_FOLDER, TEXT_LOG

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class ProgressReporter:
    """Shows the steps of a run. `log_folder`: the run folder whose `logs/train.log` gets every line too;
    None: no file.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 0,
        console: Console | None = None,
        log_folder: Path | None = None,
    ) -> None:
        self._console = console or Console()
        self._total = total_steps
        self._first, self._started = first_step, time.monotonic()
        self._log = _open_log(log_folder) if log_folder is not None else None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if self._console.is_terminal:
            numbers = TextColumn("{task.fields[numbers]}", markup=False)
            columns = (
                TextColumn("step"),
                BarColumn(),
                MofNCompleteColumn(),
                numbers,
                TimeRemainingColumn(compact=True),
            )
            self._bar = Progress(*columns, console=self._console, refresh_per_second=4, transient=True)
            self._task = self._bar.add_task("", total=total_steps, completed=first_step, numbers="")
            self._bar.start()

    def advance(self, step: int, total_steps: int) -> None:
        """Step `step` is done, of so many as the run has by now: move the bar. Cheap enough for every step."""
        self._total = total_steps
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, total=total_steps)

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show numbers at a logging step: beside the bar, or as a line off a terminal."""
        numbers = describe(metrics)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        else:
            self._print(f"step {step}/{self._total}  {numbers}{self._time_left(step)}")
        self._write(f"step {step}/{self._total}  {numbers}")

    def note(self, text: str) -> None:
        """Show beside the bar what is going on instead of steps; off a terminal nothing."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, numbers=clean(text))

    def line(self, text: str) -> None:
        """Print a line above the bar: a validation, a checkpoint, a choice that was made."""
        self._print(clean(text))
        self._write(clean(text))

    def close(self) -> None:
        """Take the bar away and close the log."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _write(self, text: str) -> None:
        if self._log is not None:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self._log.flush()

    def _time_left(self, step: int) -> str:
        done = step - self._first
        if done <= 0 or step >= self._total:
            return ""
        seconds = (time.monotonic() - self._started) / done * (self._total - step)
        return f"  {_clock(seconds)} left"


def clean(text: str) -> str:
    """Text with every control character written out (`\\n`, `\\x1b`), so that it stays one harmless line."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def describe(metrics: Mapping[str, float]) -> str:
    """`loss 2.3456  lr 3.0e-04  12,345 tok/s` from a step's metrics; what a line has no room for stays in
    metrics.jsonl.
    """
    shown = []
    for name, (label, form) in _SHOWN.items():
        if name in metrics:
            shown.append(f"{label} {metrics[name]:{form}}" if label else f"{metrics[name]:{form}} tok/s")
    return "  ".join(shown)


_SHOWN = {
    "loss": ("loss", ".4f"),
    "learning_rate": ("lr", ".2e"),
    "gradient_norm": ("norm", ".2f"),
    "tokens_per_second": ("", ",.0f"),
}


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _open_log(run_folder: Path) -> TextIO:
    (run_folder / LOGS_FOLDER).mkdir(parents=True, exist_ok=True)
    return (run_folder / LOGS_FOLDER / TEXT_LOG).open("a", encoding="utf-8")
