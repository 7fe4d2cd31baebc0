"""`operations.jsonl`: what operations did to a run, one line each."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from llm_trainer.run_dir import JSON, OPERATIONS_FILE


@dataclass(frozen=True)
class Event:
    """One operation that was carried out.

    Attributes:
        entry: Its number in the schedule, from 1.
        step: Updates before it.
        operation: Its name.
        value: Its value.
        why: What triggered it.
        desc: The schedule's own description.
        loss_before: Validation loss before it, in nats per token; None if not known.
        loss_after: Validation loss after it, if it was evaluated.
        parameters_before: Parameters of the model before it.
        parameters_after: Parameters of the model after it.
        seconds: Time it took, without the evaluation.
    """

    entry: int
    step: int
    operation: str
    value: JSON
    why: str
    desc: str | None
    loss_before: float | None
    loss_after: float | None
    parameters_before: int
    parameters_after: int
    seconds: float

    def __str__(self) -> str:
        after = f" → {_number(self.loss_after)}" if self.loss_after is not None else ""
        return (
            f"step {self.step}  {self.operation} {json.dumps(self.value)} ({self.why}): "
            f"loss {_number(self.loss_before)}{after}, "
            f"parameters {self.parameters_before:,} → {self.parameters_after:,}, {self.seconds:.2f} s"
            + (f"  ({self.desc})" if self.desc else "")
        )


class EventLog:
    """The file in a run folder. Each entry is there once: a run that rolled back replaces its earlier lines.

    Args:
        run_dir: The run folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / OPERATIONS_FILE

    def add(self, event: Event) -> None:
        """Append an event, and drop the lines of an interrupted or rolled-back run for this entry and later
        ones.
        """
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if _entry_of(line) < event.entry]
        record = {"time": round(time.time(), 3), **asdict(event)}
        text = "".join(f"{line}\n" for line in [*kept, json.dumps(record)])
        temporary = self.path.with_name(f".tmp-{self.path.name}")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path)


def _entry_of(line: str) -> float:
    try:
        return float(json.loads(line)["entry"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # cut off by a kill


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:.4f}"
