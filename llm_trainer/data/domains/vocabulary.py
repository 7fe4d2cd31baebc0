"""Finds the terms of a domain: words that are more frequent in its texts than in general text.

The score is the log-likelihood ratio of Dunning (1993, "Accurate methods for the statistics of surprise and
coincidence"): twice the logarithm of how much likelier the two counts are with one rate for each text than
with one rate for both. Unlike a ratio of rates it does not prefer rare words, and unlike a difference of
rates it does not prefer frequent ones; chance exceeds a score of about 10.8 once in a thousand cases.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SCORE = "log-likelihood ratio (Dunning 1993) against general text"
_WORD = re.compile(r"\\?[^\W\d_](?:[\w'-]*\w)?")
_MAX_WORDS = 2_000_000
"""Distinct words that are kept while counting; above that, words seen once are dropped."""
_MIN_COUNT = 3
_MIN_LETTERS = 3
_MAX_TEXT_FRACTION = 0.9
"""Words in a larger fraction of a domain's texts belong to their template, as “Question:” does."""


@dataclass(frozen=True, slots=True)
class Term:
    """A word with its score, its count in the domain, and its rates per million words."""

    term: str
    score: float
    count: int
    per_million: float
    general_per_million: float


@dataclass
class WordCounts:
    """How often each word occurs, and in how many texts.

    Attributes:
        words: Occurrences of each word.
        texts_with: Number of texts with each word.
        texts: Number of texts.
    """

    words: Counter[str]
    texts_with: Counter[str]
    texts: int

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> WordCounts:
        """Count words (and LaTeX commands with their backslash) in lower case."""
        counts = cls(Counter(), Counter(), 0)
        for text in texts:
            found = [word.lower() for word in _WORD.findall(text)]
            counts.words.update(found)
            counts.texts_with.update(set(found))
            counts.texts += 1
            if len(counts.words) > _MAX_WORDS:
                counts.words = Counter({word: count for word, count in counts.words.items() if count > 1})
                counts.texts_with = Counter(
                    {word: count for word, count in counts.texts_with.items() if word in counts.words}
                )
        return counts


def rank_terms(domain: WordCounts, general: WordCounts, limit: int) -> list[Term]:
    """Return the domain's highest scoring words.

    A term is relatively more frequent in the domain, occurs at least three times, and is not in nearly every
    text.

    Args:
        domain: The words of the domain.
        general: The words of general text.
        limit: The most terms to return.
    """
    domain_total, general_total = domain.words.total(), general.words.total()
    found = []
    for word, count in domain.words.items():
        other = general.words[word]
        is_excluded = (
            count < _MIN_COUNT or len(word) < _MIN_LETTERS or count * general_total <= other * domain_total
        )
        if is_excluded or domain.texts_with[word] > _MAX_TEXT_FRACTION * domain.texts:
            continue
        score = log_likelihood_ratio(count, domain_total, other, general_total)
        found.append(
            Term(
                word,
                round(score, 3),
                count,
                _per_million(count, domain_total),
                _per_million(other, general_total),
            )
        )
    return sorted(found, key=lambda term: (-term.score, term.term))[:limit]


def log_likelihood_ratio(count: int, total: int, other_count: int, other_total: int) -> float:
    """Return Dunning's statistic for `count` of `total` against `other_count` of `other_total`."""
    pairs = [(count, total), (other_count, other_total)]
    common_rate = sum(one for one, _ in pairs) / max(1, sum(size for _, size in pairs))
    return 2 * sum(
        _log_likelihood(one, size, one / size) - _log_likelihood(one, size, common_rate)
        for one, size in pairs
        if size
    )


def _log_likelihood(count: int, total: int, rate: float) -> float:
    """Logarithm of the binomial likelihood, without the term that does not depend on the rate."""
    seen = count * math.log(rate) if count else 0.0
    return seen + ((total - count) * math.log1p(-rate) if total > count else 0.0)


def _per_million(count: int, total: int) -> float:
    return round(1e6 * count / max(1, total), 2)


def tokens_of_terms(found: Sequence[Sequence[Term]], known: Iterable[str]) -> list[str]:
    """Return the terms of several domains as tokens to add to a tokenizer, best first.

    Args:
        found: The terms of each domain.
        known: Tokens that the tokenizer already has.

    Returns:
        Each term with a space before it, as it occurs in texts.
    """
    is_known = set(known)
    ranked = sorted((term for terms in found for term in terms), key=lambda term: (-term.score, term.term))
    tokens = dict.fromkeys(f" {term.term}" for term in ranked)
    return [token for token in tokens if token not in is_known]
