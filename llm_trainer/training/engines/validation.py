"""Loss over a held-out split: every token once, in rows packed as in training, one sum divided by one count.

The result does not depend on the batch size. Sums are added and divided once, and rows that fill up the last
batch (so that every batch has one shape) carry no labels. Frameworks that average batches, or repeat samples,
give results that depend on the batch size (transformers#39241). Only scalars are kept, so the split may be of
any length.
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
    """The result of a validation.

    Attributes:
        loss: Mean loss in nats per token.
        tokens: Predicted tokens.
        perplexity: exp(loss).
        bits_per_byte: Loss in bits per byte of text, where the split knows the length of its text.
    """

    loss: float
    tokens: int
    perplexity: float
    bits_per_byte: float | None = None

    @classmethod
    def from_loss(cls, loss: float) -> ValidationResult:
        """The result of an earlier validation of which only the loss was stored.

        Args:
            loss: Mean loss in nats per token.
        """
        return cls(loss, 0, math.exp(loss) if loss < 700 else math.inf)

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics to report, by name."""
        named = {"val_loss": self.loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        return {name: value for name, value in named.items() if value is not None}


def validate(
    model: Transformer,
    dataset: TokenDataset,
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
    """Mean loss over a split, in evaluation mode and without gradients. A collective call.

    Args:
        model: The model.
        dataset: The split.
        context: Tokens in a row.
        batch_size: Rows per batch.
        objective: What is computed (default: next-token cross-entropy).
        device: Where to compute (default: where the model is).
        autocast: Makes the context of each forward pass.
        limit: Batches to evaluate, spread over the split (default: all).
        packing: How rows are packed (default: greedily).
        on_batch: Called after each batch with the number of batches so far.
        step: The module that training runs, which gathers a sharded model.
        process_group: The ranks, which divide the batches and get the same result.

    Returns:
        Loss, perplexity and bits per byte.

    Raises:
        DataError: If there is nothing to predict.
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
        dataset,
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
            f"the validation split has {dataset.num_tokens} tokens and nothing to predict; give it more text"
        )
    mean = total / count
    return ValidationResult(
        mean, count, math.exp(mean) if mean < 700 else math.inf, bits_per_byte(mean, dataset)
    )


def bits_per_byte(loss: float, dataset: TokenDataset) -> float | None:
    """Convert a loss in nats per token to bits per byte: loss / ln 2 × tokens / bytes.

    Unlike a loss per token it can be compared across tokenizers.

    Args:
        loss: Mean loss in nats per token.
        dataset: The split, which knows the bytes of its text.

    Returns:
        Bits per byte; None where the length of the text is unknown.
    """
    if not dataset.num_bytes:
        return None
    return loss / math.log(2) * dataset.num_tokens / dataset.num_bytes
