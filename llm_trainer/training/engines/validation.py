"""Loss over a held-out split: every token once, in rows packed as training packs them, one sum over one
count.

The result does not depend on the batch size: sums are added and divided once, and rows that fill the last
batch up (so that a compiled model sees one shape) carry no labels. Frameworks that average batches, or repeat
samples, differ by batch size (transformers#39241). Only scalars are kept, so the split may be of any length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from llm_trainer.config import DataError
from llm_trainer.data.sampling.packing import Packing
from llm_trainer.data.sampling.samplers import validation_batches
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.distributed.context_parallel import shard_batch
from llm_trainer.distributed.parallelize import reshard_parameters
from llm_trainer.distributed.process_group import ProcessGroup
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.objectives.objective import ModelWithObjective, NextToken, Objective


@dataclass(frozen=True)
class ValidationResult:
    """`loss` in nats a token over `tokens` predicted tokens; `bits_per_byte` where the split knows how long
    its text was.
    """

    loss: float
    tokens: int
    perplexity: float
    bits_per_byte: float | None = None

    @classmethod
    def of_loss(cls, loss: float) -> ValidationResult:
        """One of which only the loss is remembered."""
        return cls(loss, 0, math.exp(loss) if loss < 700 else math.inf)

    @property
    def metrics(self) -> dict[str, float]:
        """As reported."""
        named = {"val_loss": self.loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        return {name: value for name, value in named.items() if value is not None}


def validate(
    model: Transformer,
    tokens: TokenDataset,
    context: int,
    batch_size: int,
    *,
    objective: Objective | None = None,
    device: torch.device | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    limit: int | None = None,
    packing: Packing | None = None,
    on_batch: Callable[[int], None] | None = None,
    step: nn.Module | None = None,
    process_group: ProcessGroup | None = None,
) -> ValidationResult:
    """Mean loss of `model` over the rows of `tokens`, packed so (default: greedy), in evaluation mode and
    without gradients.

    `limit`: only so many batches, spread over the split; `on_batch` is told after each batch how many there have been. `ranks` share the
    batches and get the same result; `step` is the module that training runs, which gathers a model that is cut over them. Raises
    DataError when there is nothing to predict.
    """
    step, process_group = (
        step or ModelWithObjective(model, objective or NextToken()),
        process_group or ProcessGroup(),
    )
    device = device or next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    batches = validation_batches(
        tokens,
        context,
        batch_size,
        limit=limit,
        packing=packing,
        rank=process_group.data_rank,
        ranks=process_group.data_world_size,
    )
    try:
        with torch.no_grad():
            for index, batch in enumerate(batches):
                with autocast():
                    loss_sum, tokens_in_batch = step(shard_batch(batch, process_group).to(device))
                total += float(loss_sum)
                count += int(tokens_in_batch)
                if on_batch is not None:
                    on_batch(index + 1)
    finally:
        reshard_parameters(step)
        model.train(was_training)
    total, supervised = process_group.all_reduce_sum([total, count])
    count = int(supervised)
    if count == 0:
        raise DataError(
            f"the validation split has {tokens.num_tokens} tokens, nothing to predict; give it more text"
        )
    mean = total / count
    return ValidationResult(
        mean, count, math.exp(mean) if mean < 700 else math.inf, bits_per_byte(mean, tokens)
    )


def bits_per_byte(loss: float, tokens: TokenDataset) -> float | None:
    """Nats a token → bits a byte of the text: loss / ln 2 × tokens / bytes. Comparable across tokenizers, as
    a loss a token is not.
    """
    if not tokens.num_bytes:
        return None
    return loss / math.log(2) * tokens.num_tokens / tokens.num_bytes
