"""Running out of memory: how it is recognised, and the error that says so."""

from __future__ import annotations

import torch

from llm_trainer.config import LLMTrainerError


class OutOfMemory(LLMTrainerError):
    """There was not enough memory for a micro-batch. Where `is_agreed`, every rank raises this, and all can
    go on together.
    """

    def __init__(self, message: str, *, is_agreed: bool = True) -> None:
        super().__init__(message)
        self.is_agreed = is_agreed


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on a GPU or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and any(
        words in said for words in ("can't allocate memory", "out of memory")
    )
