"""Watching a run's memory and load: into its metrics, a warning when memory grows short, an emergency
checkpoint before it is gone.

It looks at the edges of steps, when the run reports and otherwise every `watch_seconds`: no thread competes
with the training for the interpreter, and what is found is found where all ranks can act on it together.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from llm_trainer.config import TrainingConfig
from llm_trainer.training.logging.system_stats import Machine, Usage

if TYPE_CHECKING:
    from llm_trainer.training.checkpoint.checkpoint_policy import Saving

_AGAIN = 0.05  # a share has to fall by this before its warning or emergency can come again


class Watcher:
    """Looks at the machine for one rank; `say` is told of shares over `memory_warning`."""

    def __init__(self, training: TrainingConfig, device: torch.device, say: Callable[[str], None]) -> None:
        self.machine = Machine(device, training.memory_limit_gb)
        self._training, self._say = training, say
        self._usage: Usage | None = None
        self._last_look = time.monotonic()
        self._is_warned = self._is_pressed = self._asks_to_save = False

    def metrics(self) -> dict[str, float]:
        """Use of the machine now, as numbers to record."""
        return self._look().metrics()

    def wants_emergency(self) -> bool:
        """Whether memory has come over `memory_emergency` since the last time this was asked; looks when it
        is time to.
        """
        if (
            self._training.watch_seconds
            and time.monotonic() - self._last_look >= self._training.watch_seconds
        ):
            self._look()
        wants, self._asks_to_save = self._asks_to_save, False
        return wants

    def rescue(self, saving: Saving) -> None:
        """Memory is nearly used up on some rank: save while there is some. All ranks call this at a step's
        edge.
        """
        self._say(f"memory is nearly used up: {self.describe()}; saving an emergency checkpoint")
        saving.save(emergency=True)

    def describe(self) -> str:
        """What is short, in words."""
        usage = self._usage or self._look()
        held = [f"memory {usage.memory_share:.0%} used ({usage.resident / 1e9:.2f} GB by this process)"]
        if usage.gpu_share is not None:
            held.append(f"GPU memory {usage.gpu_share:.0%} used")
        return ", ".join(held)

    def _look(self) -> Usage:
        self._usage = usage = self.machine.look()
        self._last_look = time.monotonic()
        share, training = max(usage.memory_share, usage.gpu_share or 0.0), self._training
        if share >= training.memory_warning and not self._is_warned:
            self._say(
                f"memory is getting short: {self.describe()}; a warning comes from memory_warning {training.memory_warning:g} on"
            )
        if share >= training.memory_emergency and not self._is_pressed:
            self._asks_to_save = True
        self._is_warned = share >= training.memory_warning - (_AGAIN if self._is_warned else 0.0)
        self._is_pressed = share >= training.memory_emergency - (_AGAIN if self._is_pressed else 0.0)
        return usage
