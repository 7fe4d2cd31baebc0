"""DeepSpeed's own configuration file: what it may say here, and whether its batch arithmetic fits the number of ranks.

Only the part that a run's settings have a counterpart for is admitted, since a backend file that contradicts the flags is how such runs go
wrong unseen. Training through DeepSpeed is not built yet; a file that is named is still read and judged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from llm_trainer.config.errors import UsageError
from llm_trainer.config.fields import Section, setting
from llm_trainer.config.files import read_mapping_or_list


class DeepSpeedOptimizerParameters(Section):
    """Arguments of DeepSpeed's optimizer."""

    lr: float | None = setting(None, "peak learning rate", ge=0)
    weight_decay: float | None = setting(None, "decoupled decay", ge=0)
    betas: list[float] | None = setting(None, "decay of the two moments", min_length=2, max_length=2)
    eps: float | None = setting(None, "added to the denominator", gt=0)


class DeepSpeedOptimizer(Section):
    """DeepSpeed's optimizer."""

    type: Literal["Adam", "AdamW"] = setting("AdamW", "which one")
    params: DeepSpeedOptimizerParameters = setting(DeepSpeedOptimizerParameters, "its arguments")


class DeepSpeedPrecision(Section):
    """A switch of its own section in DeepSpeed's file."""

    enabled: bool = setting(False, "on or off")
    loss_scale: float = setting(0.0, "0: found while training", ge=0)


class DeepSpeedZero(Section):
    """What is spread over the ranks."""

    stage: Literal[0, 1, 2, 3] = setting(0, "1: optimizer state, 2: and gradients, 3: and weights")


class DeepSpeedConfig(Section):
    """The file as a whole."""

    train_batch_size: int | None = setting(None, "sequences a step, over all ranks", unit="sequences", gt=0)
    train_micro_batch_size_per_gpu: int | None = setting(None, "sequences that one rank sends at once", unit="sequences", gt=0)
    gradient_accumulation_steps: int | None = setting(None, "micro-batches a step", unit="micro-batches", gt=0)
    gradient_clipping: float | None = setting(None, "gradients are scaled down to this norm", ge=0)
    optimizer: DeepSpeedOptimizer | None = setting(None, "the optimizer")
    fp16: DeepSpeedPrecision = setting(DeepSpeedPrecision, "half precision; DeepSpeed has none on CPUs")
    bf16: DeepSpeedPrecision = setting(DeepSpeedPrecision, "bfloat16")
    zero_optimization: DeepSpeedZero = setting(DeepSpeedZero, "what is spread over the ranks")

    def check_ranks(self, ranks: int) -> None:
        """Raises UsageError unless train_batch_size = micro-batch × accumulation × ranks, naming the ranks that would fit."""
        whole, micro, steps = self.train_batch_size, self.train_micro_batch_size_per_gpu, self.gradient_accumulation_steps
        if whole is None or micro is None or steps is None or whole == micro * steps * ranks:
            return
        fitting = f"it fits {whole // (micro * steps)} ranks" if whole % (micro * steps) == 0 else "it fits no number of ranks"
        raise UsageError(
            f"train_batch_size {whole} is not train_micro_batch_size_per_gpu {micro} × gradient_accumulation_steps {steps} × {ranks} ranks "
            f"= {micro * steps * ranks}; {fitting}"
        )


def read_deepspeed(path: Path) -> DeepSpeedConfig:
    """DeepSpeed's file; raises UsageError where it says what is unknown or contradicts itself."""
    content = read_mapping_or_list(path)
    if not isinstance(content, dict):
        raise UsageError(f"{path} is not a DeepSpeed configuration: it must be a mapping")
    try:
        found = DeepSpeedConfig.model_validate(content)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    if found.fp16.enabled and found.bf16.enabled:
        raise UsageError(f"{path}: fp16 and bf16 are both enabled; keep one")
    return found
