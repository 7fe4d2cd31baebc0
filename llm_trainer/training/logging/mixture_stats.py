"""What a run on a mixture has really learned from each corpus: supervised tokens, counted as they go by.

The totals are part of the run's state, so a resumed run goes on counting where it was.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from llm_trainer.data.sampling.samplers import IGNORED, Batch
from llm_trainer.distributed.process_group import Ranks


def count_sources(totals: dict[str, int], batches: Sequence[Batch], ranks: Ranks) -> None:
    """Add the supervised tokens of each corpus, over all ranks, to `totals`; batches that are from no mixture
    add nothing.
    """
    if all(batch.sources is None for batch in batches):  # alike on all ranks
        return
    counted: dict[str, int] = {}
    for batch in batches:
        if batch.sources is None:
            continue
        numbers = batch.sources.numbers.reshape(len(batch), -1).expand_as(batch.labels)[
            batch.labels != IGNORED
        ]
        for source, tokens in zip(
            batch.sources.names, numbers.bincount(minlength=len(batch.sources.names)).tolist(), strict=True
        ):
            if tokens:
                counted[source] = counted.get(source, 0) + tokens
    for of_rank in (
        [counted]
        if ranks.count == 1
        else map(json.loads, ranks.texts(json.dumps(counted if ranks.plan.speaks(ranks.rank) else {})))
    ):
        for source, tokens in of_rank.items():
            totals[source] = totals.get(source, 0) + tokens


class AchievedShares:
    """Shares of the supervised tokens since the last reading, `share/<corpus>`, and all so far,
    `tokens/<corpus>`.
    """

    def __init__(self, totals: dict[str, int]) -> None:
        self._totals, self._told = totals, dict(totals)

    def read(self) -> dict[str, float]:
        """The metrics; nothing for a run that is on no mixture."""
        new = {name: tokens - self._told.get(name, 0) for name, tokens in self._totals.items()}
        self._told = dict(self._totals)
        sum_of_new = max(1, sum(new.values()))
        shares = {f"share/{name}": tokens / sum_of_new for name, tokens in sorted(new.items())}
        return {
            **shares,
            **{f"tokens/{name}": float(tokens) for name, tokens in sorted(self._totals.items())},
        }
