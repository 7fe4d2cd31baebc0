"""Counts how many tokens of each corpus of a mixture a run has really been trained on.

The totals are part of the run's state, so a resumed run continues the count.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from llm_trainer.data.sampling.batch import IGNORE_INDEX, Batch
from llm_trainer.distributed.process_group import ProcessGroup


def count_corpus_tokens(
    totals: dict[str, int], batches: Sequence[Batch], process_group: ProcessGroup
) -> None:
    """Add the supervised tokens of each corpus, over all ranks, to `totals`. A collective call for mixtures.

    Args:
        totals: Corpus → tokens so far; changed in place.
        batches: This rank's micro-batches of a step; those without a mixture add nothing.
        process_group: The ranks.
    """
    if all(batch.sources is None for batch in batches):  # the same on all ranks
        return
    counted: dict[str, int] = {}
    for batch in batches:
        if batch.sources is None:
            continue
        numbers = batch.sources.numbers.reshape(len(batch), -1).expand_as(batch.labels)[
            batch.labels != IGNORE_INDEX
        ]
        for source, tokens in zip(
            batch.sources.names, numbers.bincount(minlength=len(batch.sources.names)).tolist(), strict=True
        ):
            if tokens:
                counted[source] = counted.get(source, 0) + tokens
    for of_rank in (
        [counted]
        if process_group.world_size == 1
        else map(
            json.loads,
            process_group.all_gather_text(
                json.dumps(counted if process_group.plan.owns_loss(process_group.rank) else {})
            ),
        )
    ):
        for source, tokens in of_rank.items():
            totals[source] = totals.get(source, 0) + tokens


class MixtureStats:
    """Reports each corpus's fraction of the supervised tokens since the last report, and its total.

    The metrics are `share/<corpus>` and `tokens/<corpus>`.

    Args:
        totals: Corpus → tokens so far, which `count_corpus_tokens` updates.
    """

    def __init__(self, totals: dict[str, int]) -> None:
        self._totals, self._reported = totals, dict(totals)

    def read(self) -> dict[str, float]:
        """Return the metrics and start a new interval; empty for a run without a mixture."""
        new = {name: tokens - self._reported.get(name, 0) for name, tokens in self._totals.items()}
        self._reported = dict(self._totals)
        sum_of_new = max(1, sum(new.values()))
        fractions = {f"share/{name}": tokens / sum_of_new for name, tokens in sorted(new.items())}
        return {
            **fractions,
            **{f"tokens/{name}": float(tokens) for name, tokens in sorted(self._totals.items())},
        }
