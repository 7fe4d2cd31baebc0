"""`operations.jsonl`: what operations did to a run, a line each."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from llm_trainer.run_dir import JSON, OPERATIONS_FILE


@dataclass(frozen=True)
class Entry:
    """One operation that fired; losses in nats (None: not known), `seconds` without the evaluation after it."""

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
        loss = f"loss {_number(self.loss_before)}" + (
            f" → {_number(self.loss_after)}" if self.loss_after is not None else ""
        )
        return (
            f"step {self.step}  {self.operation} {json.dumps(self.value)}: {self.why}; {loss}; "
            f"parameters {self.parameters_before:,} → {self.parameters_after:,}; {self.seconds:.2f} s"
            + (f"  ({self.desc})" if self.desc else "")
        )


class Journal:
    """The file in a run folder. Each entry is told once: a run that went back writes over what it had come
    to.
    """

    def __init__(self, run_folder: Path) -> None:
        self.path = run_folder / OPERATIONS_FILE

    def add(self, entry: Entry) -> None:
        """Append an entry, dropping what an interrupted or rolled-back run said of this one and later ones."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if _entry_of(line) < entry.entry]
        said = {"time": round(time.time(), 3), **asdict(entry)}
        text = "".join(f"{line}\n" for line in [*kept, json.dumps(said)])
        temporary = self.path.with_name(f".tmp-{self.path.name}")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path)


def _entry_of(line: str) -> float:
    try:
        return float(json.loads(line)["entry"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # cut by a kill


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:.4f}"
