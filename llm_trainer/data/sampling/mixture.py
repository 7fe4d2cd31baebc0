"""Several corpora as one training order: shares exact over any long window, each sample a function of (seed,
its number).

Drawing each sample's corpus at random gives shares that wander off by the square root of the samples, and
finding how far corpus A has been read at sample i would need the i draws before it. Here the weights become
counts of a period of 65,536 samples, and within a period each corpus's samples stand at even distances from a
phase that is keyed by seed, stage, period and corpus (a low-discrepancy sequence, as fair queueing of packets
has it). So in any window a corpus is off its share by at most twice the number of corpora, in samples; sample
i's corpus and place in it follow in O(1) from i alone, however many ranks ask and wherever a run resumes.

Weights are shares of the supervised *tokens*: where rows of one corpus hold fewer of them (padding,
overlaps), it gets more rows. Each corpus is read in its own order, epoch after epoch, and goes on from stage
to stage where it was. Stages end at a step, an epoch or a number of tokens; a stage that is counted in steps
ends elsewhere in the data when the batch size changes, so then a resume is refused and says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from llm_trainer.config.duration import Duration
from llm_trainer.config.schema.mixture import MixtureStage, check_stages
from llm_trainer.data.sampling.batch import Batch, Sampler, Sources, joined
from llm_trainer.data.sampling.concat import joined_fields
from llm_trainer.data.sampling.permutation import combine
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.errors import UsageError

PERIOD = 2**16


class TokenMixture(TokenDataset):
    """Corpora of one tokenizer, as one stream for whoever counts or checks, and one by one for
    `MixtureSampler`.

    Raises DataError where their tokenizers differ and UsageError for stages that do not weigh each of them.
    """

    def __init__(
        self, members: Mapping[str, TokenDataset], stages: Sequence[MixtureStage], source: str = "a mixture"
    ) -> None:
        check_stages(stages, members.keys(), source)
        super().__init__(**joined_fields(members, source))
        self.members, self.stages = dict(members), list(stages)

    def describe(self) -> str:
        """The shares in words: `math 25.0%, code 75.0% until 2000 steps; then math 50.0%, code 50.0%`."""
        stages = []
        for stage in self.stages:
            whole = sum(stage.weights.values())
            shares = ", ".join(f"{name} {weight / whole:.1%}" for name, weight in stage.weights.items())
            stages.append(
                shares if stage.until is None else f"{shares} until {stage.until.value:g} {stage.until.unit}"
            )
        return "; then ".join(stages)

    def with_stages(self, stages: Sequence[MixtureStage]) -> TokenMixture:
        """The same corpora in other shares."""
        return TokenMixture(self.members, stages, self.source)


class MixtureSampler:
    """The training order over several samplers; `locate` counts the corpora in the order of `names`."""

    def __init__(
        self,
        members: Mapping[str, Sampler],
        stages: Sequence[MixtureStage],
        seed: int,
        *,
        context: int,
        sequences_per_step: int = 1,
    ) -> None:
        check_stages(stages, members.keys(), "mixture")
        self.names, self._members, self._seed = list(members), list(members.values()), seed
        used = [
            index for index, name in enumerate(self.names) if any(stage.weights[name] for stage in stages)
        ]
        self.samples_per_epoch = sum(self._members[index].samples_per_epoch for index in used)
        self._counts = [self._counts_of(stage) for stage in stages]
        ends = [stage.until for stage in stages if stage.until is not None]
        self._starts = [0, *(self._in_samples(end, context, sequences_per_step) for end in ends)]
        if any(early >= late for early, late in zip(self._starts, self._starts[1:], strict=False)):
            said = ", ".join(
                f"{end} = sample {start:,}" for end, start in zip(ends, self._starts[1:], strict=True)
            )
            raise UsageError(f"the stages of the mixture must end one after the other, not at {said}")
        self._patterns: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self._bases = [
            np.zeros(len(self.names), dtype=np.int64)
        ]  # how far each corpus has been read where a stage begins
        for stage, length in enumerate(np.diff(self._starts).tolist()):
            self._bases.append(self._bases[-1] + self._read_in(stage, length))
        # All batches alike, whatever corpora are in them: a compiled model is not compiled again.
        self._masks = any(self._members[index].batch(0, 1).document_ids is not None for index in used)
        first = self._counts[0] / PERIOD
        self.tokens_per_sample = float(
            sum(share * member.tokens_per_sample for share, member in zip(first, self._members, strict=True))
        )

    @property
    def order(self) -> str:
        """Counts of each corpus in a period, by the sample from which they hold, and how the corpora are
        packed.
        """
        stages = [
            f"from sample {start}: "
            + ", ".join(f"{name} {count}" for name, count in zip(self.names, counts.tolist(), strict=True))
            for start, counts in zip(self._starts, self._counts, strict=True)
        ]
        return f"mixture of {PERIOD} ({'; '.join(stages)}) of {self._members[0].order}"

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples `first_sample … first_sample + count - 1` as one batch of `count` rows."""
        sources, places = self.locate(np.arange(first_sample, first_sample + count))
        parts: list[Batch] = []
        rows: list[np.ndarray] = []
        for source in np.unique(sources).tolist():
            chosen = np.flatnonzero(sources == source)
            # Numbers of one corpus follow each other without a gap.
            parts.append(self._members[source].batch(int(places[chosen[0]]), len(chosen)))
            rows.append(chosen)
        whole = joined(parts, with_documents=self._masks).rows(
            torch.from_numpy(np.argsort(np.concatenate(rows)))
        )
        return replace(whole, sources=Sources(tuple(self.names), torch.from_numpy(sources)))

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which corpus each of these samples is from, and which of its samples it is; int64 of the same
        shape.
        """
        samples = np.asarray(samples, dtype=np.int64)
        stages = np.searchsorted(self._starts, samples, side="right") - 1
        periods, within = np.divmod(samples - np.array(self._starts)[stages], PERIOD)
        sources, places = np.empty_like(samples), np.empty_like(samples)
        for stage, period in sorted(
            set(zip(stages.flatten().tolist(), periods.flatten().tolist(), strict=True))
        ):
            chosen = (stages == stage) & (periods == period)
            pattern, ranks = self._pattern(stage, period)
            sources[chosen] = pattern[within[chosen]]
            before = self._bases[stage] + period * self._counts[stage]
            places[chosen] = before[sources[chosen]] + ranks[within[chosen]]
        return sources, places

    def _counts_of(self, stage: MixtureStage) -> np.ndarray:
        """Samples of each corpus in a period (largest remainders), at least one where there is a weight."""
        per_sample = np.array([max(member.tokens_per_sample, 1e-9) for member in self._members])
        weights = np.array([stage.weights[name] for name in self.names]) / per_sample
        exact = weights / weights.sum() * PERIOD
        counts: np.ndarray = np.maximum(np.floor(exact).astype(np.int64), weights > 0)
        short = PERIOD - int(counts.sum())
        if short >= 0:
            counts[np.argsort(counts - exact, kind="stable")[:short]] += 1
        else:  # corpora that were raised to one sample: the largest gives them theirs
            counts[counts.argmax()] += short
        return counts

    def _in_samples(self, end: Duration, context: int, sequences_per_step: int) -> int:
        if end.unit == "steps":
            return int(end.value) * sequences_per_step
        return math.ceil(end.value / context if end.unit == "tokens" else end.value * self.samples_per_epoch)

    def _read_in(self, stage: int, length: int) -> np.ndarray:
        """How many samples of each corpus a stage of this length reads."""
        periods, rest = divmod(length, PERIOD)
        last = np.bincount(self._pattern(stage, periods)[0][:rest], minlength=len(self.names))
        read: np.ndarray = periods * self._counts[stage] + last
        return read

    def _pattern(self, stage: int, period: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each place in a period: the corpus, and how many of its samples came before in the period."""
        found = self._patterns.get((stage, period))
        if found is None:
            counts = self._counts[stage]
            owners = np.repeat(np.arange(len(counts)), counts)
            ranks = np.arange(PERIOD) - np.repeat(np.cumsum(counts) - counts, counts)
            phases = np.array(
                [combine(self._seed, stage, period, corpus) / 2**64 for corpus in range(len(counts))]
            )
            order = np.argsort((ranks + phases[owners]) / counts[owners], kind="stable")
            found = owners[order], ranks[order]
            self._patterns = {(stage, period): found}  # a cache of the last one, as the members keep theirs
        return found
