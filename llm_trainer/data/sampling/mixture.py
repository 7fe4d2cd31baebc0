"""Several corpora as one training order, with exact proportions over any long window.

Drawing the corpus of each sample at random gives proportions that deviate by the square root of the number of
samples, and the position within corpus A at sample i would depend on the i draws before it. Here the weights
become counts per period of 65,536 samples, and within a period the samples of each corpus are spaced evenly,
starting at a phase that is keyed by seed, stage, period and corpus (a low-discrepancy sequence, as in fair
queueing of packets). In any window a corpus therefore deviates from its proportion by at most twice the
number of corpora, in samples. The corpus of sample i and the position in it follow in O(1) from i alone, on
any number of ranks and after any resume.

Weights are fractions of the supervised *tokens*: a corpus whose rows hold fewer of them (padding, overlaps)
gets more rows. Each corpus is read in its own order, epoch after epoch, and continues from stage to stage at
the position that it has reached. Stages end at a step, an epoch or a number of tokens. A stage that is
counted in steps ends at another sample when the batch size changes, so a resume with another batch size is
refused with an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from llm_trainer.config.duration import Duration
from llm_trainer.config.schema.mixture import MixtureStage, check_stages
from llm_trainer.data.hashing import derive_key
from llm_trainer.data.sampling.batch import Batch, BatchSources, Sampler, concat_batches
from llm_trainer.data.sampling.concat import concat_fields
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.errors import UsageError

PERIOD = 2**16


class MixtureDataset(TokenDataset):
    """Corpora with one tokenizer: one stream for counts and checks, separate ones for `MixtureSampler`."""

    def __init__(
        self, members: Mapping[str, TokenDataset], stages: Sequence[MixtureStage], source: str = "a mixture"
    ) -> None:
        """Concatenate the corpora and remember their weights.

        Args:
            members: Name of the corpus → its tokens.
            stages: Weights of the corpora; every stage except the last one has an end.
            source: What error messages call the mixture.

        Raises:
            DataError: The corpora have different tokenizers.
            UsageError: A stage does not have a weight for each corpus.
        """
        check_stages(stages, members.keys(), source)
        super().__init__(**concat_fields(members, source))
        self.members, self.stages = dict(members), list(stages)

    def describe(self) -> str:
        """The proportions: `math 25.0%, code 75.0% until 2000 steps; then math 50.0%, code 50.0%`."""
        stages = []
        for stage in self.stages:
            total = sum(stage.weights.values())
            proportions = ", ".join(f"{name} {weight / total:.1%}" for name, weight in stage.weights.items())
            until = "" if stage.until is None else f" until {stage.until.value:g} {stage.until.unit}"
            stages.append(proportions + until)
        return "; then ".join(stages)

    def with_stages(self, stages: Sequence[MixtureStage]) -> MixtureDataset:
        """The same corpora with other weights."""
        return MixtureDataset(self.members, stages, self.source)


class MixtureSampler:
    """The training order over several samplers."""

    def __init__(
        self,
        members: Mapping[str, Sampler],
        stages: Sequence[MixtureStage],
        seed: int,
        *,
        context: int,
        sequences_per_step: int = 1,
    ) -> None:
        """Compute where each stage begins.

        Args:
            members: Name of the corpus → its sampler.
            stages: Weights of the corpora; every stage except the last one has an end.
            seed: Random seed of the order.
            context: Tokens per row; converts stages given in tokens to samples.
            sequences_per_step: Rows per optimizer step; converts stages given in steps to samples.

        Raises:
            UsageError: The stages do not match the corpora, or do not end one after the other.
        """
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
            given = ", ".join(
                f"{end} = sample {start:,}" for end, start in zip(ends, self._starts[1:], strict=True)
            )
            raise UsageError(f"the stages of the mixture must end one after the other, not at {given}")
        self._patterns: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        # How many samples of each corpus have been read when a stage begins.
        self._bases = [np.zeros(len(self.names), dtype=np.int64)]
        for stage, length in enumerate(np.diff(self._starts).tolist()):
            self._bases.append(self._bases[-1] + self._samples_read(stage, length))
        # All batches have the same structure whatever corpora they hold: torch.compile does not recompile.
        self._with_documents = any(
            self._members[index].batch(0, 1).document_ids is not None for index in used
        )
        first = self._counts[0] / PERIOD
        self.tokens_per_sample = float(
            sum(
                fraction * member.tokens_per_sample
                for fraction, member in zip(first, self._members, strict=True)
            )
        )

    @property
    def order(self) -> str:
        """The count of each corpus per period, by the sample from which it applies, and the packing."""
        stages = [
            f"from sample {start}: "
            + ", ".join(f"{name} {count}" for name, count in zip(self.names, counts.tolist(), strict=True))
            for start, counts in zip(self._starts, self._counts, strict=True)
        ]
        return f"mixture of {PERIOD} ({'; '.join(stages)}) of {self._members[0].order}"

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples `first_sample … first_sample + count - 1` as one batch of `count` rows."""
        sources, numbers = self.locate(np.arange(first_sample, first_sample + count))
        parts: list[Batch] = []
        rows: list[np.ndarray] = []
        for source in np.unique(sources).tolist():
            chosen = np.flatnonzero(sources == source)
            # The sample numbers of one corpus are consecutive within a batch.
            parts.append(self._members[source].batch(int(numbers[chosen[0]]), len(chosen)))
            rows.append(chosen)
        batch = concat_batches(parts, with_documents=self._with_documents).rows(
            torch.from_numpy(np.argsort(np.concatenate(rows)))
        )
        return replace(batch, sources=BatchSources(tuple(self.names), torch.from_numpy(sources)))

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map samples of the mixture to samples of its corpora.

        Args:
            samples: Sample numbers, of any shape.

        Returns:
            The corpus of each sample as an index into `names`, and the sample's number within that corpus;
            both int64 of the same shape.
        """
        samples = np.asarray(samples, dtype=np.int64)
        stages = np.searchsorted(self._starts, samples, side="right") - 1
        periods, within = np.divmod(samples - np.array(self._starts)[stages], PERIOD)
        sources, numbers = np.empty_like(samples), np.empty_like(samples)
        for stage, period in sorted(
            set(zip(stages.flatten().tolist(), periods.flatten().tolist(), strict=True))
        ):
            chosen = (stages == stage) & (periods == period)
            pattern, ranks = self._pattern(stage, period)
            sources[chosen] = pattern[within[chosen]]
            before = self._bases[stage] + period * self._counts[stage]
            numbers[chosen] = before[sources[chosen]] + ranks[within[chosen]]
        return sources, numbers

    def _counts_of(self, stage: MixtureStage) -> np.ndarray:
        """Samples of each corpus per period (largest remainders), at least one where the weight is not 0."""
        per_sample = np.array([max(member.tokens_per_sample, 1e-9) for member in self._members])
        weights = np.array([stage.weights[name] for name in self.names]) / per_sample
        exact = weights / weights.sum() * PERIOD
        counts: np.ndarray = np.maximum(np.floor(exact).astype(np.int64), weights > 0)
        missing = PERIOD - int(counts.sum())
        if missing >= 0:
            counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
        else:  # some corpora were raised to one sample: the largest corpus gives up as many
            counts[counts.argmax()] += missing
        return counts

    def _in_samples(self, end: Duration, context: int, sequences_per_step: int) -> int:
        if end.unit == "steps":
            return int(end.value) * sequences_per_step
        return math.ceil(end.value / context if end.unit == "tokens" else end.value * self.samples_per_epoch)

    def _samples_read(self, stage: int, length: int) -> np.ndarray:
        """How many samples of each corpus a stage of this length reads."""
        periods, rest = divmod(length, PERIOD)
        last = np.bincount(self._pattern(stage, periods)[0][:rest], minlength=len(self.names))
        read: np.ndarray = periods * self._counts[stage] + last
        return read

    def _pattern(self, stage: int, period: int) -> tuple[np.ndarray, np.ndarray]:
        """For each sample of a period: its corpus, and how many samples of that corpus precede it there."""
        found = self._patterns.get((stage, period))
        if found is None:
            counts = self._counts[stage]
            owners = np.repeat(np.arange(len(counts)), counts)
            ranks = np.arange(PERIOD) - np.repeat(np.cumsum(counts) - counts, counts)
            phases = np.array(
                [derive_key(self._seed, stage, period, corpus) / 2**64 for corpus in range(len(counts))]
            )
            order = np.argsort((ranks + phases[owners]) / counts[owners], kind="stable")
            found = owners[order], ranks[order]
            self._patterns = {(stage, period): found}  # only the last one is cached, as in the members
        return found
