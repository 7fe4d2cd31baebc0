"""What this process and its machine use, and what one rank may use: resident memory, processor, the GPU's
memory and load.

Resident memory is held against what the process may have: `memory_limit_gb`, a container's limit (cgroup v2),
or the machine. A GPU's memory is held against it by what tensors took at most, and not by what PyTorch's
allocator keeps, which fills the device in time on purpose and gives it back when asked.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from llm_trainer.distributed.process_group import Ranks

GIGABYTE = 1e9
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Usage:
    """One look. `memory_share` is of what the process may hold on the host, `gpu_share` of its GPU; the GPU's fields are None without one,
    `gpu_percent` also without NVML.
    """

    resident: int
    memory_share: float
    cpu_percent: float
    gpu_memory: int | None = None
    gpu_share: float | None = None
    gpu_percent: float | None = None

    def metrics(self) -> dict[str, float]:
        """As numbers to record."""
        seen = {
            "system/rss_gb": self.resident / GIGABYTE,
            "system/memory_share": self.memory_share,
            "system/cpu_percent": self.cpu_percent,
            "system/gpu_memory_gb": None if self.gpu_memory is None else self.gpu_memory / GIGABYTE,
            "system/gpu_memory_share": self.gpu_share,
            "system/gpu_percent": self.gpu_percent,
        }
        return {name: value for name, value in seen.items() if value is not None}


class Machine:
    """The process's view of its machine; `limit_gb` is what one rank may hold on `device`."""

    def __init__(self, device: torch.device, limit_gb: float | None = None) -> None:
        self.device = device
        self._limit = None if limit_gb is None else int(limit_gb * GIGABYTE)
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call begins the interval
        self._has_nvml = device.type == "cuda"

    def look(self) -> Usage:
        """Use now; the processor's and the GPU's load are since the last look and of the last moments."""
        resident = int(self._process.memory_info().rss)
        load = float(self._process.cpu_percent())
        if self.device.type != "cuda":
            share = self._host_share() if self._limit is None else resident / self._limit
            return Usage(resident, share, load)
        held = torch.cuda.max_memory_allocated(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        others = max(0, total - free - torch.cuda.memory_reserved(self.device))
        share = (held + others) / total if self._limit is None else held / self._limit
        return Usage(resident, self._host_share(), load, held, share, self._gpu_percent())

    def allowance(self, ranks: Ranks) -> int:
        """Bytes that this rank may hold on its device in all, what it holds now included. A collective call."""
        here = ranks.texts(socket.gethostname()).count(socket.gethostname())
        if self._limit is not None:
            return self._limit
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            return int(free + torch.cuda.memory_reserved(self.device))
        resident = int(self._process.memory_info().rss)
        free_here = int(psutil.virtual_memory().available)
        limit = _cgroup_bytes("memory.max")
        if limit is not None:
            free_here = min(free_here, max(0, limit - (_cgroup_bytes("memory.current") or 0)))
        return resident + free_here // here

    def held(self) -> int:
        """Bytes that this rank holds on its device now."""
        if self.device.type == "cuda":
            return int(torch.cuda.memory_allocated(self.device))
        return int(self._process.memory_info().rss)

    def _host_share(self) -> float:
        memory = psutil.virtual_memory()
        share = 1 - memory.available / memory.total
        limit, held = _cgroup_bytes("memory.max"), _cgroup_bytes("memory.current")
        if limit and held is not None:
            share = max(share, (held - (_inactive_files() or 0)) / limit)
        return share

    def _gpu_percent(self) -> float | None:
        """The GPU's load by NVML; None from the first time on that it is not there."""
        if not self._has_nvml:
            return None
        try:
            return float(torch.cuda.utilization(self.device))
        except (
            ImportError,
            RuntimeError,
        ):  # without the package nvidia-ml-py, or in a container without NVML
            self._has_nvml = False
            return None


def _cgroup_bytes(name: str) -> int | None:
    """A number of this container's memory controller; None where there is none or no limit."""
    try:
        text = (_CGROUP / name).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _inactive_files() -> int | None:
    """Bytes of file cache that the kernel gives back first, which count as use in a container."""
    try:
        lines = (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), None)
