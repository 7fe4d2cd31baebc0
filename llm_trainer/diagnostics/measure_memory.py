"""The peak of a real training step above what the process held before it: the kernel's high-water mark on a
CPU, CUDA's own on a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

from llm_trainer.config import TrainingConfig, UsageError
from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.data.sampling.batch import Batch
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.engines.precision import Precision
from llm_trainer.training.engines.train_step import forward_backward, update
from llm_trainer.training.objectives.objective import NextToken, TrainingStep
from llm_trainer.training.optim.optimizers import build_optimizers
from llm_trainer.training.optim.param_groups import prepare_trainable


def measured_step(
    shape: ModelConfig,
    training: TrainingConfig,
    sequences: int,
    micro_batches: int = 1,
    model: Transformer | None = None,
) -> int:
    """Bytes that the second of two steps on random tokens needed above what was held before it; `model` (of
    this shape) is changed by it.

    What the settings freeze is not trained. Raises UsageError where the system does not tell, and as
    `prepare_trainable`.
    """
    device = torch.device("cuda" if training.device.startswith("cuda") else "cpu")
    model = (Transformer(shape) if model is None else model).to(device).train()
    prepare_trainable(model, training)
    step, optimizers = TrainingStep(model, NextToken(training.loss)), build_optimizers(model, training)
    precision = Precision("bf16" if training.precision == "auto" else training.precision, device)
    ids = torch.randint(shape.vocab_size, (sequences, shape.max_position_embeddings))
    batches = [Batch(ids, ids, None, ids.numel())] * micro_batches
    parameters = list(model.parameters())

    def run() -> None:
        tokens = ids.numel() * micro_batches
        loss = forward_backward(step, batches, tokens, precision, seed=None, index=0)
        update(optimizers, parameters, loss, tokens, precision, training.max_grad_norm)

    run()
    return peak_above(run, device)


def peak_above(step: Callable[[], None], device: torch.device) -> int:
    """Bytes that running `step` needs above what is held before it. Raises UsageError where the system does
    not tell.
    """
    before = _held(device)
    _forget_peak(device)
    step()
    return _peak(device) - before


def _held(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else _status("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError as error:
        raise UsageError(
            "this system does not tell a process's peak of memory (no /proc/self/clear_refs); measure on Linux"
        ) from error


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return 1024 * int(found[1])
