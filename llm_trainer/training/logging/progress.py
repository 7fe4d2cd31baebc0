"""Shows the progress of a run: a bar on a terminal, plain lines elsewhere, and the same in `logs/train.log`.

Only the main rank has a `ProgressReporter`, so only one rank logs. Control characters in text from outside
(paths, names, samples) are escaped first: a line break in a run's name must not forge a line of the log, and
an escape sequence must not redraw the terminal.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from llm_trainer.run_dir import LOGS_FOLDER, TEXT_LOG
from llm_trainer.training.logging.append_file import AppendFile

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class ProgressReporter:
    """Shows the steps and metrics of a run.

    Args:
        total_steps: The length of the run.
        first_step: The step that a resumed run continues from.
        console: Where to print; by default standard output.
        log_folder: The run folder whose `logs/train.log` gets every line too; None for no file.
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
        """Move the bar after a step; cheap enough for every step.

        Args:
            step: The number of steps done.
            total_steps: The length of the run, which operations may have changed.
        """
        self._total = total_steps
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, total=total_steps)

    def show_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a logging step: next to the bar, or as a line where there is no terminal."""
        numbers = format_metrics(metrics)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        else:
            self._print(f"step {step}/{self._total}  {numbers}{self._time_left(step)}")
        self._write(f"step {step}/{self._total}  {numbers}")

    def show_status(self, text: str) -> None:
        """Show next to the bar what the run does between steps; nothing where there is no terminal."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, numbers=escape_control_characters(text))

    def print_line(self, text: str) -> None:
        """Print a line above the bar, for example about a validation or a checkpoint."""
        self._print(escape_control_characters(text))
        self._write(escape_control_characters(text))

    def close(self) -> None:
        """Remove the bar and close the log."""
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

    def _time_left(self, step: int) -> str:
        done = step - self._first
        if done <= 0 or step >= self._total:
            return ""
        seconds = (time.monotonic() - self._started) / done * (self._total - step)
        return f"  {_clock(seconds)} left"


def escape_control_characters(text: str) -> str:
    """Replace every control character by its escape sequence, so that text stays on one line."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Format the main metrics of a step like `loss 2.3456  lr 3.0e-04  12,345 tok/s`.

    The others are in metrics.jsonl only.
    """
    shown = []
    for name, (label, spec) in _SHOWN.items():
        if name in metrics:
            shown.append(f"{label} {metrics[name]:{spec}}" if label else f"{metrics[name]:{spec}} tok/s")
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


def _open_log(run_folder: Path) -> AppendFile:
    (run_folder / LOGS_FOLDER).mkdir(parents=True, exist_ok=True)
    return AppendFile(run_folder / LOGS_FOLDER / TEXT_LOG)
