"""What a model is trained to do: a function of the model and a batch that returns a sum of losses and the
tokens it is over.

A sum and a count, never a mean: the step divides once by the tokens of all its micro-batches (and ranks), so
accumulation, packing and ragged labels cannot change the gradient. A mean of means would
(transformers#34191). Distillation and early exits are other objectives for the same loop.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from llm_trainer.data.hashing import GOLDEN_GAMMA, splitmix64
from llm_trainer.data.sampling.samplers import Batch
from llm_trainer.model.transformer import Transformer
from llm_trainer.training.objectives.cross_entropy import LossMode, Workspace, linear_cross_entropy_sum


class LossSum(NamedTuple):
    """A sum of losses over supervised tokens, in nats (fp32 scalar, differentiable), and their number (int64
    scalar).
    """

    total: Tensor
    tokens: Tensor


class Objective(Protocol):
    """A training objective. Called once a micro-batch inside autocast; must not divide by anything."""

    def __call__(self, model: Transformer, batch: Batch) -> LossSum:
        """The batch's loss, summed."""


class NextToken:
    """Cross-entropy of each next token, by `loss_mode` with all logits at once (dense) or in chunks that
    never hold them all.
    """

    def __init__(self, loss_mode: LossMode = "auto") -> None:
        self.loss_mode: LossMode = loss_mode
        self._workspace = Workspace()

    def __call__(self, model: Transformer, batch: Batch) -> LossSum:
        """Labels are already shifted; -100 is not supervised."""
        domains = (
            None
            if batch.sources is None
            else model.domain_indices(batch.sources.names, batch.sources.numbers)
        )
        hidden = model.hidden_states(
            batch.input_ids, document_ids=batch.document_ids, domains=domains
        )  # (B, T, C)
        return self.of_hidden(model, hidden, batch.labels)

    def of_hidden(self, model: Transformer, hidden: Tensor, labels: Tensor) -> LossSum:
        """From what the head reads, (B, T, C), and labels (B, T)."""
        total = linear_cross_entropy_sum(
            hidden.flatten(0, 1),
            model.lm_head.effective_weight(),
            labels.flatten(),
            mode=self.loss_mode,
            soft_cap=model.config.logit_soft_cap,
            workspace=self._workspace,
        )
        return LossSum(total, (labels != -100).sum())


class TrainingStep(nn.Module):
    """Model and objective as one module, so that DDP, FSDP and compilation can wrap the whole forward pass of
    a micro-batch.
    """

    def __init__(self, model: Transformer, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Batch) -> LossSum:
        """The objective on one micro-batch."""
        return self.objective(self.model, batch)


def seed_dropout(seed: int, step: int, micro_batch: int, rank: int, device: torch.device) -> None:
    """Seed the generator that dropout draws from, as a function of the place in the run.

    With this no generator's state has to be saved: a resumed run draws what the uninterrupted one would have
    drawn.
    """
    mixed = seed
    for part in (step, micro_batch, rank):  # neighbouring values give unrelated seeds
        mixed = splitmix64(mixed + part + GOLDEN_GAMMA)
    generator = torch.default_generator
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index or 0]
    elif device.type == "mps":
        torch.mps.manual_seed(mixed)
        return
    generator.manual_seed(mixed)
