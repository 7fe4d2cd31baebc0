"""Measures the peak memory of a real training step above what the process used before it.

On a CPU this is the kernel's high-water mark, on a GPU that of CUDA's allocator.
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
from llm_trainer.training.objectives.objective import ModelWithObjective, NextToken
from llm_trainer.training.optim.optimizers import build_optimizers
from llm_trainer.training.optim.param_groups import prepare_trainable


def measure_step_memory(
    config: ModelConfig,
    training: TrainingConfig,
    sequences: int,
    micro_batches: int = 1,
    model: Transformer | None = None,
) -> int:
    """Run two training steps on random tokens and return the peak memory of the second, in bytes.

    Parameters that the settings freeze are not trained.

    Args:
        config: The model.
        training: The settings.
        sequences: Sequences per micro-batch, of full length.
        micro_batches: Micro-batches per step.
        model: A model of this configuration, which is trained in place; None for a new one.

    Raises:
        UsageError: The operating system does not report peak memory, or `prepare_trainable` refuses the
            settings.
    """
    device = torch.device("cuda" if training.device.startswith("cuda") else "cpu")
    model = (Transformer(config) if model is None else model).to(device).train()
    prepare_trainable(model, training)
    step, optimizers = ModelWithObjective(model, NextToken(training.loss)), build_optimizers(model, training)
    precision = Precision("bf16" if training.precision == "auto" else training.precision, device)
    ids = torch.randint(config.vocab_size, (sequences, config.max_position_embeddings))
    batches = [Batch(ids, ids, None, ids.numel())] * micro_batches
    parameters = list(model.parameters())

    def run() -> None:
        tokens = ids.numel() * micro_batches
        loss = forward_backward(step, batches, tokens, precision, seed=None, index=0)
        update(optimizers, parameters, loss, tokens, precision, training.max_grad_norm)

    run()
    return measure_peak_memory(run, device)


def measure_peak_memory(step: Callable[[], None], device: torch.device) -> int:
    """Run `step` and return the peak memory above what was in use before it, in bytes.

    Raises:
        UsageError: The operating system does not report peak memory.
    """
    before = _in_use(device)
    _reset_peak(device)
    step()
    return _peak(device) - before


def _in_use(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else _status("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError as error:
        raise UsageError(
            "this operating system does not report the peak memory of a process (no /proc/self/clear_refs); "
            "measure on Linux"
        ) from error


def _status(name: str) -> int:
    """A value of /proc/self/status, in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return 1024 * int(found[1])
