"""From the hidden state of each row to the logits of its next token, or to those logits that can decide the
draw.

What: for a single row on a CPU, greedy and top-k decoding look at a few of the largest logits only, so that
`int8_candidates` finds the tokens that can be among them and only these are computed exactly.
Why: with 32,000 tokens the product with the head takes 2.6 ms of a step in fp32 and 1.6 in bf16, and the
search 1.1 ms. Check: tests/inference/cpu/test_int8_candidates.py compares generated ids with those of the
full product. Switch: LLM_TRAINER_CPU_DECODER=0 (see the package's docstring).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llm_trainer.config.environment import is_cpu_decoder_enabled
from llm_trainer.inference.cpu.int8_candidates import Int8Candidates, is_worthwhile
from llm_trainer.inference.cpu.matvec import select_linear
from llm_trainer.model.layers import Linear
from llm_trainer.model.transformer import Transformer

# Building the int8 copy costs as much as it saves in about a hundred tokens, so short completions do without
# it.
TOKENS_BEFORE_CANDIDATES = 64


class TokenScores(NamedTuple):
    """Logits (B, n) of the tokens `ids` (n,), ascending; None: of all tokens, from 0 on."""

    logits: Tensor
    ids: Tensor | None = None


class LMHead:
    """The output matrix of a model in evaluation mode, whose weights do not change."""

    def __init__(self, model: Transformer, vocab_size: int) -> None:
        """Prepare the head.

        Args:
            model: The network.
            vocab_size: Number of tokens; rows of the matrix from there on have no token and get no logits.
        """
        self.model = model
        self.vocab_size = vocab_size
        is_plain = type(model.lm_head) is Linear and model.lm_head.bias is None
        self._is_fast = is_plain and is_cpu_decoder_enabled()
        self._candidates: Int8Candidates | None = None
        self._tokens = 0

    def __call__(self, hidden: Tensor, num_candidates: int | None = None) -> TokenScores:
        """Score the next token.

        Args:
            hidden: Hidden states, (B, C).
            num_candidates: How many of each row's largest logits must be among the scores. None: all.

        Returns:
            The scores of all tokens, or of some.
        """
        if not self._is_fast:
            return TokenScores(self.model.logits(hidden)[:, : self.vocab_size])
        weight = self.model.lm_head.weight[: self.vocab_size]
        ids = None
        if num_candidates is not None and len(hidden) == 1:
            ids = self._search(weight, hidden[0], num_candidates)
        logits = select_linear(weight, len(hidden))(hidden, weight if ids is None else weight[ids], None)
        cap = self.model.config.logit_soft_cap
        return TokenScores(logits if cap is None else cap * torch.tanh(logits / cap), ids)

    def _search(self, weight: Tensor, hidden: Tensor, count: int) -> Tensor | None:
        self._tokens += 1
        if self._candidates is None:
            if self._tokens < TOKENS_BEFORE_CANDIDATES or not is_worthwhile(weight):
                return None
            self._candidates = Int8Candidates(weight)
        return self._candidates(hidden, count)
