"""What a run leaves for its report beside its metrics: the command, the machine, sizes, the outcome, samples;
in `report.json`.

These are gathered where and when the run happens; the report itself may be written anywhere, later, again.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llm_trainer.errors import CheckpointError

FACTS_FILE = "report.json"


@dataclass(frozen=True)
class Sample:
    """A prompt and how the model went on."""

    prompt: str
    text: str


@dataclass
class RunFacts:
    """Each table is name → value as it is to be read."""

    command: str = ""
    headline: dict[str, str] = field(default_factory=dict)
    model: dict[str, str] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)


def save_facts(run_folder: Path, facts: RunFacts) -> None:
    """Write `report.json` whole or not at all."""
    temporary = run_folder / f".{FACTS_FILE}.tmp"
    temporary.write_text(json.dumps(asdict(facts), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    temporary.replace(run_folder / FACTS_FILE)


def load_facts(run_folder: Path) -> RunFacts:
    """The facts that a run left; empty ones where it left none. Raises CheckpointError for a file that is
    something else.
    """
    path = run_folder / FACTS_FILE
    if not path.exists():
        return RunFacts()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        samples = [Sample(**sample) for sample in values.pop("samples", [])]
        return RunFacts(**values, samples=samples)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a report's record ({error}); remove it to write the report without it"
        ) from error


def machine_facts(device: str = "cpu") -> dict[str, str]:
    """This machine, as a reader of figures wants to know it."""
    import psutil
    import torch

    facts = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": f"{_usable_cores()} usable of {os.cpu_count()}",
        "threads": str(torch.get_num_threads()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
    }
    if device.startswith("cuda") and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.device(device))
        facts["GPU"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return facts


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
