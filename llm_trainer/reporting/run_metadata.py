"""What a run records for its report in addition to its metrics: command, machine, sizes, result and samples.

It is collected where and when the run happens, and saved as `report.json`. The report itself may be written
later, elsewhere, and repeatedly.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llm_trainer.errors import CheckpointError

METADATA_FILE = "report.json"


@dataclass(frozen=True)
class Sample:
    """A prompt and the model's continuation."""

    prompt: str
    text: str


@dataclass
class RunMetadata:
    """What a report shows besides metrics and settings; each table maps a name to a formatted value.

    Attributes:
        command: The command line of the run.
        headline: Figures for the top of the page.
        model: The model's sizes.
        data: The data's sizes.
        machine: The machine, from `machine_info`.
        samples: Generated text.
    """

    command: str = ""
    headline: dict[str, str] = field(default_factory=dict)
    model: dict[str, str] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)


def save_run_metadata(run_folder: Path, metadata: RunMetadata) -> None:
    """Write `report.json` atomically."""
    temporary = run_folder / f".{METADATA_FILE}.tmp"
    temporary.write_text(json.dumps(asdict(metadata), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    temporary.replace(run_folder / METADATA_FILE)


def load_run_metadata(run_folder: Path) -> RunMetadata:
    """Read `report.json`; without the file the result is empty.

    Raises:
        CheckpointError: The file is not such a record.
    """
    path = run_folder / METADATA_FILE
    if not path.exists():
        return RunMetadata()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        samples = [Sample(**sample) for sample in values.pop("samples", [])]
        return RunMetadata(**values, samples=samples)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not the record of a report ({error}); remove it to write the report without it"
        ) from error


def machine_info(device: str = "cpu") -> dict[str, str]:
    """Describe this machine: system, processor, memory, versions, and the GPU if `device` is one."""
    import psutil
    import torch

    info = {
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
        info["GPU"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return info


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
