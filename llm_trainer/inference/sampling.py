"""From logits to the next token, for a batch whose rows have settings and seeds of their own.

The order is the usual one (that of transformers' logits processors): repetition penalty, temperature, top-k,
top-p, min-p, draw. Temperature 0, and one too low to divide by, is an exact argmax. A draw inverts the
cumulative distribution, in the order of token ids, at one uniform number from the row's own generator. So
what a row draws depends on its logits and its seed alone, and never on the other rows, the batch size or the
device. Drawing one number per row instead of noise for each logit (`torch.multinomial`, Gumbel) is also
cheaper.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from llm_trainer.config.schema.generation import GenerationConfig
from llm_trainer.errors import NotFiniteError

# The top-p set is nearly always among this many likeliest tokens: finding them is several times cheaper than
# sorting a vocabulary.
TOP_P_PROBE = 256


class SamplingState:
    """What one sequence brings to a draw: its settings, its random numbers and the tokens it has seen."""

    def __init__(self, settings: GenerationConfig, prompt_ids: Sequence[int] = (), sample: int = 0) -> None:
        """Start a sequence.

        Args:
            settings: Its sampling settings.
            prompt_ids: Its prompt, whose tokens the repetition penalty counts as seen.
            sample: The number of this completion among those of one prompt; each has random numbers of its
                own.
        """
        self.settings = settings
        # A string seed goes through SHA-512, so that neighbouring seeds have nothing in common. Without a
        # seed, the operating system gives one.
        self.random = random.Random(None if settings.seed is None else f"{settings.seed}/{sample}")
        self.seen: set[int] | None = set(prompt_ids) if settings.repetition_penalty != 1.0 else None


class Sampler:
    """Draws the next token of every row at once; built again only when the rows of the batch change."""

    def __init__(
        self, rows: Sequence[SamplingState], vocab_size: int, device: torch.device | str = "cpu"
    ) -> None:
        """Prepare the settings of all rows as tensors.

        Args:
            rows: The sequences of the batch.
            vocab_size: Number of tokens that may be drawn.
            device: Where the logits are.
        """
        self.rows = list(rows)
        self.device = torch.device(device)
        settings = [row.settings for row in rows]
        self.greedy = all(each.is_greedy for each in settings)
        self.any_greedy = any(each.is_greedy for each in settings)
        # Rows that are greedy get temperature 1 here, and the argmax replaces their draw below.
        self.temperature = self._column([1.0 if each.is_greedy else each.temperature for each in settings])
        self.top_k = [min(each.top_k or vocab_size, vocab_size) for each in settings]
        self.top_p = self._column([1.0 if each.top_p is None else each.top_p for each in settings])
        self.min_p = self._column([each.min_p or 0.0 for each in settings])
        self.limits_top_k = any(k < vocab_size for k in self.top_k)
        self.limits_top_p = any(each.top_p is not None and each.top_p < 1 for each in settings)
        self.limits_min_p = any(each.min_p for each in settings)
        self.is_greedy = torch.tensor([each.is_greedy for each in settings], device=self.device)
        self.penalty, self.seen = self._repetition(vocab_size)

    @property
    def num_candidates(self) -> int | None:
        """How many of a row's largest logits (with those equal to the last of them) decide the draw; None:
        all.
        """
        if self.seen is not None:
            return None
        counts = [1 if row.settings.is_greedy else row.settings.top_k for row in self.rows]
        return max(filter(None, counts)) if all(counts) else None

    def __call__(self, logits: Tensor, ids: Tensor | None = None) -> Tensor:
        """Draw a token for each row.

        Args:
            logits: (B, n), of any floating type.
            ids: The tokens that the logits belong to, (n,), ascending. None: all, from 0 on. Tokens may be
                left out if they are not among the `num_candidates` largest of any row; the draw is then the
                same.

        Returns:
            Token ids, (B,).

        Raises:
            NotFiniteError: The logits of a row are NaN or infinite.
        """
        drawn = self._draw(logits)
        return drawn if ids is None else ids[drawn]

    def _draw(self, logits: Tensor) -> Tensor:
        if self.seen is not None:
            logits = penalize_repetition(logits.float(), self.seen, self.penalty)
        if self.greedy:
            ids = logits.argmax(dim=-1)
            check_finite(logits, ids)
        else:
            probabilities = torch.softmax(self.restrict(logits.float() / self.temperature), dim=-1)
            ids = draw(probabilities, [row.random.random() for row in self.rows])
            check_finite(probabilities, ids)
            if self.any_greedy:
                ids = torch.where(self.is_greedy, logits.argmax(dim=-1), ids)
        if self.seen is not None:
            self._remember(ids)
        return ids

    def restrict(self, scores: Tensor) -> Tensor:
        """Set every token that top-k, top-p or min-p excludes to −∞.

        Args:
            scores: Logits divided by the temperature, (B, V).

        Returns:
            (B, V).
        """
        if self.limits_top_k:
            scores = keep_top_k(scores, self.top_k)
        if self.limits_top_p:
            scores = keep_top_p(scores, self.top_p)
        if self.limits_min_p:
            scores = keep_min_p(scores, self.min_p)
        return scores

    def _column(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)[:, None]

    def _repetition(self, vocab_size: int) -> tuple[Tensor, Tensor | None]:
        penalty = self._column([row.settings.repetition_penalty for row in self.rows])
        if all(row.seen is None for row in self.rows):
            return penalty, None
        seen = torch.zeros(len(self.rows), vocab_size, dtype=torch.bool, device=self.device)
        for index, row in enumerate(self.rows):
            if row.seen:
                seen[index, list(row.seen)] = True
        return penalty, seen

    def _remember(self, ids: Tensor) -> None:
        assert self.seen is not None
        self.seen.scatter_(1, ids[:, None], True)
        for row, token in zip(self.rows, ids.tolist(), strict=True):
            if row.seen is not None:
                row.seen.add(token)


def check_finite(scores: Tensor, ids: Tensor) -> None:
    """Refuse a draw from scores that are not finite. Only the drawn scores are looked at: NaN and infinity
    win every argmax, and make every probability of their row NaN.

    Args:
        scores: Logits or probabilities, (B, V).
        ids: The drawn tokens, (B,).

    Raises:
        NotFiniteError: A drawn score is NaN or infinite.
    """
    if not scores.gather(1, ids[:, None]).isfinite().all():
        raise NotFiniteError


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Divide positive and multiply negative logits of seen tokens by the penalty (Keskar 2019,
    arXiv:1909.05858).

    Args:
        logits: (B, V).
        seen: (B, V), bool.
        penalty: (B, 1).

    Returns:
        (B, V).
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(scores: Tensor, top_k: Sequence[int]) -> Tensor:
    """Set scores below the k-th largest of each row to −∞; those equal to the k-th stay.

    Args:
        scores: (B, V).
        top_k: k of each row.

    Returns:
        (B, V).
    """
    largest_k = max((k for k in top_k if k < scores.shape[1]), default=scores.shape[1])
    values = scores.topk(largest_k, dim=-1).values
    rank = torch.tensor([min(k, largest_k) - 1 for k in top_k], device=scores.device)[:, None]
    unlimited = torch.tensor([k >= scores.shape[1] for k in top_k], device=scores.device)[:, None]
    threshold = values.gather(1, rank).masked_fill(unlimited, -torch.inf)
    return scores.masked_fill(scores < threshold, -torch.inf)


def keep_top_p(scores: Tensor, top_p: Tensor, probe: int = TOP_P_PROBE) -> Tensor:
    """Set all scores but the fewest likeliest tokens with a total probability of `top_p` to −∞ (Holtzman
    2019, arXiv:1904.09751).

    A token stays while the tokens likelier than it have less than `top_p` together; the likeliest always
    stays.

    Args:
        scores: (B, V).
        top_p: (B, 1).
        probe: How many likeliest tokens are looked at before the whole vocabulary is sorted.

    Returns:
        (B, V).
    """
    normalizer = scores.logsumexp(dim=-1, keepdim=True)
    count = min(probe, scores.shape[1])
    while True:
        likeliest = scores.topk(count, dim=-1).values
        probabilities = (likeliest - normalizer).exp()
        mass = probabilities.cumsum(dim=-1)
        if count == scores.shape[1] or bool((mass[:, -1:] >= top_p).all()):
            break
        count = scores.shape[1]
    kept = (mass - probabilities < top_p) | (top_p >= 1)
    kept[:, 0] = True
    threshold = likeliest.masked_fill(~kept, torch.inf).amin(dim=-1, keepdim=True)
    return scores.masked_fill((scores < threshold) & (top_p < 1), -torch.inf)


def keep_min_p(scores: Tensor, min_p: Tensor) -> Tensor:
    """Set tokens less likely than `min_p` times the likeliest of their row to −∞ (Nguyen 2024,
    arXiv:2407.01082).

    Args:
        scores: (B, V).
        min_p: (B, 1).

    Returns:
        (B, V).
    """
    threshold = scores.amax(dim=-1, keepdim=True) + min_p.log()
    return scores.masked_fill(scores < threshold, -torch.inf)


def draw(probabilities: Tensor, uniforms: Sequence[float]) -> Tensor:
    """The token of each row at which the cumulative probability first exceeds the row's uniform number.

    Sums are in double precision: in single precision, the tail of a large vocabulary would be lost in
    rounding. A token of probability 0 is never drawn, whatever rounding does at the ends.

    Args:
        probabilities: (B, V).
        uniforms: A number in [0, 1) per row.

    Returns:
        Token ids, (B,); some token of the vocabulary where probabilities are NaN.
    """
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    numbers = torch.tensor(uniforms, dtype=torch.float64, device=probabilities.device)
    target = numbers[:, None] * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # The product may round up to the total itself; then it is the last token that has any probability.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())[:, 0]
    return torch.minimum(ids, last).clamp_max_(probabilities.shape[1] - 1)
