"""Running out of memory: how it is recognised, and the error that reports it."""

from __future__ import annotations

import torch

from llm_trainer.config import LLMTrainerError


class OutOfMemory(LLMTrainerError):
    """There was not enough memory for a micro-batch.

    Args:
        message: What did not fit, and where.
        is_agreed: Whether every rank raises this error, so that all can continue together.
    """

    def __init__(self, message: str, *, is_agreed: bool = True) -> None:
        super().__init__(message)
        self.is_agreed = is_agreed


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory could not be allocated, on a GPU or on the host.

    Args:
        error: What a forward or backward pass raised.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    message = str(error)
    return isinstance(error, RuntimeError) and any(
        words in message for words in ("can't allocate memory", "out of memory")
    )
