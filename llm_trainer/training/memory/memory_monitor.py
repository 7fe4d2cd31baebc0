"""Memory and load of a run: metrics, a warning when memory runs short, an emergency checkpoint before it is
gone.

The monitor looks between steps: when the run reports, and otherwise every `memory_poll_seconds`. So no thread
competes with training for the interpreter, and what it finds is found where all ranks can act on it together.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from llm_trainer.config import TrainingConfig
from llm_trainer.training.logging.system_stats import ResourceUsage, SystemStats

_HYSTERESIS = 0.05  # usage has to fall by this before a warning or an emergency can come again


class MemoryMonitor:
    """Watches the memory of one rank.

    Args:
        training: The settings `memory_limit_gb`, `memory_warning_fraction`, `memory_emergency_fraction` and
            `memory_poll_seconds`.
        device: Where this rank computes.
        log: Called with each warning.
    """

    def __init__(self, training: TrainingConfig, device: torch.device, log: Callable[[str], None]) -> None:
        self.machine = SystemStats(device, training.memory_limit_gb)
        self._training, self._log = training, log
        self._usage: ResourceUsage | None = None
        self._last_poll = time.monotonic()
        self._has_warned = self._is_critical = self._has_emergency = False

    def metrics(self) -> dict[str, float]:
        """The present usage, as metrics to log."""
        return self._poll().metrics()

    def take_emergency(self) -> bool:
        """Whether usage has risen above `memory_emergency_fraction` since this was last called. Polls when
        due.
        """
        seconds = self._training.memory_poll_seconds
        if seconds and time.monotonic() - self._last_poll >= seconds:
            self._poll()
        taken, self._has_emergency = self._has_emergency, False
        return taken

    def describe(self) -> str:
        """The usage in words: `memory 91% used (3.20 GB by this process)`."""
        usage = self._usage or self._poll()
        parts = [f"memory {usage.memory_fraction:.0%} used ({usage.resident / 1e9:.2f} GB by this process)"]
        if usage.gpu_memory_fraction is not None:
            parts.append(f"GPU memory {usage.gpu_memory_fraction:.0%} used")
        return ", ".join(parts)

    def _poll(self) -> ResourceUsage:
        self._usage = usage = self.machine.sample()
        self._last_poll = time.monotonic()
        used, training = max(usage.memory_fraction, usage.gpu_memory_fraction or 0.0), self._training
        warning, emergency = training.memory_warning_fraction, training.memory_emergency_fraction
        if used >= warning and not self._has_warned:
            self._log(f"memory is running short: {self.describe()} (memory_warning_fraction is {warning:g})")
        if used >= emergency and not self._is_critical:
            self._has_emergency = True
        self._has_warned = used >= warning - (_HYSTERESIS if self._has_warned else 0.0)
        self._is_critical = used >= emergency - (_HYSTERESIS if self._is_critical else 0.0)
        return usage
