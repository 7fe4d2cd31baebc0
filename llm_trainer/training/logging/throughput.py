"""Measures the throughput of a run, and how much of the device's peak it reaches.

MFU (model FLOPs utilisation, PaLM, arXiv:2204.02311) = tokens/s × training FLOPs per token (model/flops.py) ÷
the device's peak. The peak is NVIDIA's published dense tensor-core figure if the GPU is known. Otherwise it
is the best of a few measured matrix products, which is what a CPU can really reach and differs between two
CPUs of the same name.
"""

from __future__ import annotations

import functools
import resource
import sys
import time

import torch

# Dense bf16/fp16 tensor-core peaks, FLOP/s; for fp32 inputs PyTorch's default (no TF32) is far below and is
# measured instead.
_GPU_PEAKS = {
    "H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "A10": 125e12,
    "L40S": 362e12, "L4": 121e12, "V100": 125e12, "T4": 65e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
_PEAK_SECONDS = 0.05


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return the peak FLOP/s of a device in matrix products of `dtype`, and the source of the figure."""
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for known, peak in _GPU_PEAKS.items():
            if known in name:
                return peak, f"{known}, published"
    return measured_peak_flops(device, dtype), "measured"


@functools.cache
def measured_peak_flops(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Return the best rate of a size³ matrix product, in FLOP/s.

    Measuring takes about 50 ms and is done once per process.
    """
    generator = torch.Generator(device).manual_seed(0)  # leaves the run's own generators untouched
    left = torch.randn(size, size, device=device, generator=generator).to(dtype)
    best, ends = 0.0, 0.0
    while ends == 0.0 or time.perf_counter() < ends:
        _wait(device)
        start = time.perf_counter()
        left @ left
        _wait(device)
        seconds = time.perf_counter() - start
        if ends == 0.0:  # the first product also initialises the library
            ends = time.perf_counter() + _PEAK_SECONDS
        best = max(best, 2 * size**3 / seconds)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far: the allocator's on a GPU, else the resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class ThroughputMeter:
    """Measures tokens per second since the last reading, without the time of validation and saving.

    Args:
        flops_per_token: Training FLOPs per token.
        device: Where the model runs.
        dtype: The type in which matrix products are computed.
    """

    def __init__(self, flops_per_token: float, device: torch.device, dtype: torch.dtype) -> None:
        self.flops_per_token = flops_per_token
        self.device = device
        self.dtype = dtype
        self._peak: float | None = None
        self._tokens = 0
        self._start = time.perf_counter()

    def add(self, tokens: int) -> None:
        """Count the tokens of a step."""
        self._tokens += tokens

    def exclude(self, seconds: float) -> None:
        """Do not count so many seconds, which were not spent on training."""
        self._start += seconds

    def read(self) -> dict[str, float]:
        """Return tokens_per_second, mfu and memory_gb, and start a new interval."""
        _wait(self.device)
        rate = self._tokens / max(time.perf_counter() - self._start, 1e-9)
        if self._peak is None:
            self._peak = peak_flops(self.device, self.dtype)[0]
        self._tokens, self._start = 0, time.perf_counter()
        return {
            "tokens_per_second": rate,
            "mfu": rate * self.flops_per_token / self._peak,
            "memory_gb": peak_memory_bytes(self.device) / 1e9,
        }
