"""Measures what this process and its machine use: memory, processor, and the GPU's memory and load.

Host memory is compared with what the process may use: `memory_limit_gb`, a container's limit (cgroup v2), or
the machine's memory. Of a GPU's memory the peak of allocated tensors counts, not what PyTorch's caching
allocator has reserved: it fills the device over time on purpose and releases memory on request.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from llm_trainer.distributed.process_group import ProcessGroup

GIGABYTE = 1e9
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class ResourceUsage:
    """Resource usage at one moment.

    Attributes:
        resident: The resident set of this process, in bytes.
        memory_fraction: The used fraction of the host memory that the process may use.
        cpu_percent: The processor load of this process since the last sample.
        gpu_memory: The peak of allocated tensors on the GPU, in bytes; None without a GPU.
        gpu_memory_fraction: The used fraction of the GPU memory that the process may use; None without a GPU.
        gpu_percent: The GPU's load; None without a GPU or without NVML.
    """

    resident: int
    memory_fraction: float
    cpu_percent: float
    gpu_memory: int | None = None
    gpu_memory_fraction: float | None = None
    gpu_percent: float | None = None

    def metrics(self) -> dict[str, float]:
        """Return the usage as metrics; missing values are left out."""
        values = {
            "system/rss_gb": self.resident / GIGABYTE,
            "system/memory_share": self.memory_fraction,
            "system/cpu_percent": self.cpu_percent,
            "system/gpu_memory_gb": None if self.gpu_memory is None else self.gpu_memory / GIGABYTE,
            "system/gpu_memory_share": self.gpu_memory_fraction,
            "system/gpu_percent": self.gpu_percent,
        }
        return {name: value for name, value in values.items() if value is not None}


class SystemStats:
    """Samples the resource usage of this process and its machine.

    Args:
        device: Where this rank trains.
        limit_gb: The memory that one rank may use on `device`, in GB; None for all there is.
    """

    def __init__(self, device: torch.device, limit_gb: float | None = None) -> None:
        self.device = device
        self._limit = None if limit_gb is None else int(limit_gb * GIGABYTE)
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call begins the interval
        self._has_nvml = device.type == "cuda"

    def sample(self) -> ResourceUsage:
        """Return the usage now; the processor's load is the mean since the last sample."""
        resident = int(self._process.memory_info().rss)
        load = float(self._process.cpu_percent())
        if self.device.type != "cuda":
            fraction = self._host_fraction() if self._limit is None else resident / self._limit
            return ResourceUsage(resident, fraction, load)
        allocated = torch.cuda.max_memory_allocated(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        others = max(0, total - free - torch.cuda.memory_reserved(self.device))
        fraction = (allocated + others) / total if self._limit is None else allocated / self._limit
        return ResourceUsage(resident, self._host_fraction(), load, allocated, fraction, self._gpu_percent())

    def memory_budget(self, process_group: ProcessGroup) -> int:
        """Return the bytes that this rank may use on its device, including what it uses now.

        Ranks on one machine divide its free host memory equally. A collective call.
        """
        local_ranks = process_group.all_gather_text(socket.gethostname()).count(socket.gethostname())
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
        return resident + free_here // local_ranks

    def memory_in_use(self) -> int:
        """Return the bytes that this rank uses on its device now."""
        if self.device.type == "cuda":
            return int(torch.cuda.memory_allocated(self.device))
        return int(self._process.memory_info().rss)

    def _host_fraction(self) -> float:
        memory = psutil.virtual_memory()
        fraction = 1 - memory.available / memory.total
        limit, used = _cgroup_bytes("memory.max"), _cgroup_bytes("memory.current")
        if limit and used is not None:
            fraction = max(fraction, (used - (_inactive_file_bytes() or 0)) / limit)
        return fraction

    def _gpu_percent(self) -> float | None:
        """The GPU's load from NVML; None once NVML turns out to be missing."""
        if not self._has_nvml:
            return None
        try:
            return float(torch.cuda.utilization(self.device))
        except (ImportError, RuntimeError):  # no package nvidia-ml-py, or a container without NVML
            self._has_nvml = False
            return None


def _cgroup_bytes(name: str) -> int | None:
    """A value of this container's memory controller; None outside a container or without a limit."""
    try:
        text = (_CGROUP / name).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _inactive_file_bytes() -> int | None:
    """Bytes of file cache that the kernel reclaims first; a container's usage includes them."""
    try:
        lines = (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), None)
