"""Errors for the user to read. Each names what is wrong, the value, and what to do.

The command line prints the message without a traceback and exits with `exit_code`.
"""


class LLMTrainerError(Exception):
    """Something went wrong that the user can fix; the message says how."""

    exit_code = 1


class UsageError(LLMTrainerError):
    """A setting, flag or file that the user gave is unknown, contradictory or out of bounds."""

    exit_code = 2


class DataError(LLMTrainerError):
    """A corpus, shard or tokenizer cannot be used as it is."""


class CheckpointError(LLMTrainerError):
    """A checkpoint is missing, damaged or does not fit."""


class NotFiniteError(LLMTrainerError):
    """The predictions of a model are NaN or infinite, so they mean nothing."""

    def __init__(self) -> None:
        super().__init__(
            "the model's predictions are not finite numbers (NaN or infinity): its weights are damaged, or "
            "its training diverged. Use an earlier checkpoint, or --precision fp32 if less precise weights "
            "overflow"
        )
