"""The terms of a domain: words that are commoner in its texts than in general text.

The score is the log-likelihood ratio of Dunning (1993, "Accurate methods for the statistics of surprise and
coincidence"): twice the logarithm of how much likelier the two counts are with a rate for each text than with
one rate for both. Unlike a ratio of rates it does not prefer rare words, and unlike a difference it does not
prefer common ones; from about 10.8 on, chance explains it once in a thousand.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SCORE = "log-likelihood ratio (Dunning 1993) against general text"
_WORD = re.compile(r"\\?[^\W\d_](?:[\w'-]*\w)?")
_MOST_WORDS = 2_000_000  # distinct ones that are kept while counting; then those seen once go
_LEAST_COUNT = 3
_LEAST_LETTERS = 3
_FORM = 0.9  # of a domain's texts: words that are in more of them belong to their form, as “Question:” does


@dataclass(frozen=True, slots=True)
class Term:
    """A word with its score, its count in the domain and its rates a million words."""

    term: str
    score: float
    count: int
    per_million: float
    general_per_million: float


@dataclass
class WordCounts:
    """How often each word occurs, and in how many of the texts."""

    words: Counter[str]
    texts_with: Counter[str]
    texts: int

    @classmethod
    def of(cls, texts: Iterable[str]) -> WordCounts:
        """Words (and LaTeX commands with their backslash) in lower case."""
        counts = cls(Counter(), Counter(), 0)
        for text in texts:
            found = [word.lower() for word in _WORD.findall(text)]
            counts.words.update(found)
            counts.texts_with.update(set(found))
            counts.texts += 1
            if len(counts.words) > _MOST_WORDS:
                counts.words = Counter({word: count for word, count in counts.words.items() if count > 1})
                counts.texts_with = Counter(
                    {word: count for word, count in counts.texts_with.items() if word in counts.words}
                )
        return counts


def rank_terms(domain: WordCounts, general: WordCounts, limit: int) -> list[Term]:
    """The domain's highest scoring words, at most `limit`: those that are relatively commoner there, occur at
    least three times, and are not in nearly every text.
    """
    of_domain, of_general = domain.words.total(), general.words.total()
    found = []
    for word, count in domain.words.items():
        other = general.words[word]
        is_rare = (
            count < _LEAST_COUNT or len(word) < _LEAST_LETTERS or count * of_general <= other * of_domain
        )
        if is_rare or domain.texts_with[word] > _FORM * domain.texts:
            continue
        score = log_likelihood_ratio(count, of_domain, other, of_general)
        found.append(
            Term(
                word, round(score, 3), count, _per_million(count, of_domain), _per_million(other, of_general)
            )
        )
    return sorted(found, key=lambda term: (-term.score, term.term))[:limit]


def log_likelihood_ratio(count: int, total: int, other_count: int, other_total: int) -> float:
    """Dunning's statistic for `count` of `total` against `other_count` of `other_total`; 0 for equal rates."""
    pairs = [(count, total), (other_count, other_total)]
    together = sum(one for one, _ in pairs) / max(1, sum(size for _, size in pairs))
    return 2 * sum(
        _log_likelihood(one, size, one / size) - _log_likelihood(one, size, together)
        for one, size in pairs
        if size
    )


def _log_likelihood(count: int, total: int, rate: float) -> float:
    """Logarithm of the binomial likelihood, without the part that does not depend on the rate."""
    seen = count * math.log(rate) if count else 0.0
    return seen + ((total - count) * math.log1p(-rate) if total > count else 0.0)


def _per_million(count: int, total: int) -> float:
    return round(1e6 * count / max(1, total), 2)


def tokens_of_terms(found: Sequence[Sequence[Term]], is_known: Iterable[str]) -> list[str]:
    """The terms of several domains as tokens that a tokenizer lacks: with the space before them, as they
    stand in a text, best first.
    """
    known = set(is_known)
    ranked = sorted(
        (term for terms_of_one in found for term in terms_of_one), key=lambda term: (-term.score, term.term)
    )
    tokens = dict.fromkeys(f" {term.term}" for term in ranked)
    return [token for token in tokens if token not in known]
