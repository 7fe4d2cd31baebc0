"""From the hidden state of each row to the logits of its next token, or to those that will be looked at."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llm_trainer.inference.cpu.int8_candidates import Shortlist, shortlist_pays
from llm_trainer.inference.cpu.matvec import product_of
from llm_trainer.model.transformer import Linear, Transformer

# A shortlist costs as much as it saves in about a hundred tokens, so short answers go without.
TOKENS_BEFORE_SHORTLIST = 64


class Scores(NamedTuple):
    """Logits (B, n) of tokens `ids` (n,), in ascending order; none: of all tokens, from 0 on."""

    logits: Tensor
    ids: Tensor | None = None


class Head:
    """The output matrix of a model in evaluation, whose weights stay as they are."""

    def __init__(self, model: Transformer, vocab_size: int) -> None:
        """Tokens from `vocab_size` on, rows without a token, get no logits."""
        self.model = model
        self.vocab_size = vocab_size
        self.is_plain = type(model.lm_head) is Linear and model.lm_head.bias is None
        self._shortlist: Shortlist | None = None
        self._tokens = 0

    def __call__(self, hidden: Tensor, largest: int | None = None) -> Scores:
        """Hidden states (B, C); `largest`: how many of the largest logits of a row must be among the scores
        (none: all).
        """
        if not self.is_plain:
            return Scores(self.model.logits(hidden)[:, : self.vocab_size])
        weight = self.model.lm_head.weight[: self.vocab_size]
        ids = None if largest is None or len(hidden) > 1 else self._search(weight, hidden[0], largest)
        logits = product_of(weight, len(hidden))(hidden, weight if ids is None else weight[ids], None)
        cap = self.model.config.logit_soft_cap
        return Scores(logits if cap is None else cap * torch.tanh(logits / cap), ids)

    def _search(self, weight: Tensor, hidden: Tensor, largest: int) -> Tensor | None:
        self._tokens += 1
        if self._shortlist is None:
            if self._tokens < TOKENS_BEFORE_SHORTLIST or not shortlist_pays(weight):
                return None
            self._shortlist = Shortlist(weight)
        return self._shortlist(hidden, largest)
