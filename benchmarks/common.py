"""Shared parts of all benchmarks: the machine's name, alternating rounds, a table of median, spread and
ratio, and the JSON results.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass
class Figure:
    """What one contestant reached in each round. Higher is better unless the unit is a time."""

    work: str
    contestant: str
    unit: str
    rounds: list[float] = field(default_factory=list)
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """(largest − smallest) / median."""
        return (max(self.rounds) - min(self.rounds)) / self.median


def processor_name() -> str:
    """Return the name of the CPU."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8")) if info.exists() else None
    return named[1].strip() if named else platform.processor() or platform.machine()


def machine_name() -> str:
    """Return a folder name for this machine: processor and number of cores."""
    words = re.sub(r"\(\w+\)|@.*", "", processor_name())
    return f"{re.sub(r'[^a-z0-9]+', '-', words.lower()).strip('-')}-{os.cpu_count()}-cores"


def alternate(contestants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run each in turn, `rounds` times, so that temporary load on the machine affects all of them."""
    measured: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            measured[name].append(run())
    return measured


def finish(
    name: str,
    figures: Sequence[Figure],
    baselines: Mapping[str, str],
    command: str,
    targets: Sequence[Target] = (),
    notes: Sequence[str] = (),
) -> int:
    """Print table, targets and notes, and write the JSON; return 1 if a target is missed, otherwise 0."""
    print(table(figures, baselines))
    for line in (*map(str, targets), *notes):
        print(line)
    print("Wrote", write_results(name, figures, baselines, command, targets, notes))
    return int(not all(target.is_met for target in targets))


@dataclass(frozen=True)
class Finished:
    """The cost of a command: wall time, CPU time over all its threads, and its output."""

    seconds: float
    processor_seconds: float
    output: str


def run_command(command: Sequence[str | Path], folder: Path | None = None) -> Finished:
    """Run a process and time it. If it fails, print its output and raise CalledProcessError."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )
    seconds, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        print(done.stdout)
        done.check_returncode()
    return Finished(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout)


_held: list[IO[str]] = []


def report_load() -> str:
    """Wait until no other benchmark runs here, then describe the machine's load.

    Results from a busy machine are unreliable.
    """
    if not _held:  # a second lock of the same process would wait for the first
        _held.append((Path(tempfile.gettempdir()) / "llm-trainer-benchmark.lock").open("w", encoding="utf-8"))
        try:
            fcntl.flock(_held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another benchmark is running on this machine; waiting for it to finish.", flush=True)
            fcntl.flock(_held[0], fcntl.LOCK_EX)  # until this process ends
    return f"load average before the run: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def table(figures: Sequence[Figure], baselines: Mapping[str, str]) -> str:
    """Return rows of work, contestant, median, spread and ratio to the work's baseline, as Markdown."""
    by_place = {(figure.work, figure.contestant): figure for figure in figures}
    lines = ["| work | contestant | median | spread | ratio | |", "|---|---|--:|--:|--:|---|"]
    for figure in figures:
        base = by_place.get((figure.work, baselines.get(figure.work, "")))
        ratio = "" if base is None else f"{figure.median / base.median:.2f}"
        middle = f"{_number(figure.median)} {figure.unit} | ± {figure.spread / 2:.0%} | {ratio}"
        lines.append(f"| {figure.work} | {figure.contestant} | {middle} | {figure.note} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    """Format with four digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


@dataclass
class Target:
    """A goal of the project, and what this run reached."""

    what: str
    reached: float
    wanted: float
    unit: str = "×"
    is_ceiling: bool = False

    @property
    def is_met(self) -> bool:
        return self.reached <= self.wanted if self.is_ceiling else self.reached >= self.wanted

    def __str__(self) -> str:
        sense = "at most" if self.is_ceiling else "at least"
        verdict = "met" if self.is_met else "NOT met"
        return f"{self.what}: {self.reached:.3g} {self.unit} ({sense} {self.wanted:.3g}: {verdict})"


def write_results(
    name: str,
    figures: Sequence[Figure],
    baselines: Mapping[str, str],
    command: str,
    targets: Sequence[Target] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Write `benchmarks/results/<machine>/<name>.json`, the source of docs/reference/benchmarks.md."""
    import torch

    file = RESULTS / machine_name() / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "name": name,
        "command": command,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": {
            "processor": processor_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "baselines": dict(baselines),
        "figures": [
            {**asdict(figure), "median": figure.median, "spread": figure.spread} for figure in figures
        ],
        "targets": [{**asdict(target), "is_met": target.is_met} for target in targets],
        "notes": list(notes),
    }
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return file
