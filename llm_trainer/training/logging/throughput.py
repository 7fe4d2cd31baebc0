"""How fast a run goes and how much of the machine it uses.

MFU (model FLOPs utilisation, PaLM, arXiv:2204.02311) = tokens/s × training FLOPs a token (model/flops.py) ÷
the device's peak. The peak is NVIDIA's published dense tensor-core figure where the GPU is known, and
otherwise the best of a few measured matrix products, which is what a CPU can really reach and differs between
two of the same name.
"""

from __future__ import annotations

import resource
import sys
import time

import torch

# Dense bf16/fp16 tensor-core peaks, FLOP/s; for fp32 inputs PyTorch's default (no TF32) is far below and is
# measured instead.
_GPU_PEAKS = {
    "H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "A10": 125e12, "L40S": 362e12, "L4": 121e12,
    "V100": 125e12, "T4": 65e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
_PEAK_SECONDS = 0.05


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that `device` can do in products of `dtype`, and where the figure is from."""
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for known, peak in _GPU_PEAKS.items():
            if known in name:
                return peak, f"{known}, published"
    return measured_peak_flops(device, dtype), "measured"


def measured_peak_flops(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Best rate of a size³ matrix product within about 50 ms, in FLOP/s."""
    generator = torch.Generator(device).manual_seed(0)  # the run's own numbers are not for drawing from
    left = torch.randn(size, size, device=device, generator=generator).to(dtype)
    best, ends = 0.0, 0.0
    while ends == 0.0 or time.perf_counter() < ends:
        _wait(device)
        start = time.perf_counter()
        left @ left
        _wait(device)
        seconds = time.perf_counter() - start
        if ends == 0.0:  # the first product also sets the library up
            ends = time.perf_counter() + _PEAK_SECONDS
        best = max(best, 2 * size**3 / seconds)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: the allocator's on a GPU, the process's resident set otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Meter:
    """Tokens and seconds since the last reading, without what validation and saving took."""

    def __init__(self, flops_per_token: float, device: torch.device, dtype: torch.dtype) -> None:
        self.flops_per_token = flops_per_token
        self.device = device
        self.dtype = dtype
        self._peak: float | None = None
        self._tokens = 0
        self._start = time.perf_counter()

    def add(self, tokens: int) -> None:
        """So many more tokens went through."""
        self._tokens += tokens

    def leave_out(self, seconds: float) -> None:
        """So many seconds were not training."""
        self._start += seconds

    def read(self) -> dict[str, float]:
        """tokens_per_second, mfu and memory_gb since the last reading; starts anew."""
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
