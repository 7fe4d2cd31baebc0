"""Training objectives: functions of the model and a batch that return a sum of losses and a number of tokens.

An objective returns a sum and a count, never a mean. The step divides once by the tokens of all its
micro-batches (and ranks), so gradient accumulation, packing and ragged labels cannot change the gradient. A
mean of means would (transformers#34191). Distillation and early exits are other objectives for the same loop.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor, nn

from llm_trainer.data.sampling.batch import IGNORE_INDEX, Batch
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.objectives.cross_entropy import LossMode, Workspace, linear_cross_entropy_sum


class LossSum(NamedTuple):
    """A sum of losses and the number of tokens that it is over.

    Attributes:
        total: The sum over supervised tokens in nats, an fp32 scalar, differentiable.
        tokens: The number of supervised tokens, an int64 scalar.
    """

    total: Tensor
    tokens: Tensor


class Objective(Protocol):
    """A training objective, called once per micro-batch inside autocast. It must not divide by anything."""

    def __call__(self, model: Transformer, batch: Batch) -> LossSum:
        """Return the sum of the batch's losses."""


class NextToken:
    """Cross-entropy of each next token.

    Args:
        loss_mode: "dense" computes all logits at once, "chunked" never keeps them all in memory, and "auto"
            chooses by their number.
    """

    def __init__(self, loss_mode: LossMode = "auto") -> None:
        self.loss_mode: LossMode = loss_mode
        self._workspace = Workspace()

    def __call__(self, model: Transformer, batch: Batch) -> LossSum:
        """Return the sum of the batch's losses; labels are already shifted, and -100 is not supervised."""
        domains = (
            None
            if batch.sources is None
            else model.domain_indices(batch.sources.names, batch.sources.numbers)
        )
        hidden = model.hidden_states(
            batch.input_ids, document_ids=batch.document_ids, domains=domains
        )  # (B, T, C)
        return self.from_hidden_states(model, hidden, batch.labels)

    def from_hidden_states(self, model: Transformer, hidden: Tensor, labels: Tensor) -> LossSum:
        """Return the sum of losses from final hidden states.

        Args:
            model: The model whose head is applied.
            hidden: Hidden states after the final norm, (B, T, C).
            labels: Target ids, (B, T); -100 is not supervised.
        """
        total = linear_cross_entropy_sum(
            hidden.flatten(0, 1),
            model.lm_head.effective_weight(),
            labels.flatten(),
            mode=self.loss_mode,
            soft_cap=model.config.logit_soft_cap,
            workspace=self._workspace,
        )
        return LossSum(total, (labels != IGNORE_INDEX).sum())


class ModelWithObjective(nn.Module):
    """Model and objective as one module, so that DDP, FSDP and compilation can wrap the forward pass."""

    def __init__(self, model: Transformer, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Batch) -> LossSum:
        """Return the objective's sum of losses on one micro-batch."""
        return self.objective(self.model, batch)
