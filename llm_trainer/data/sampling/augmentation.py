"""Noise on the training text, against learning a small corpus by heart: spans left out, case and whitespace
changed. Off by default.

The noise is made on the ids of a row, when the row is read: sample i is noised by a generator that is seeded
by (seed, i), so each pass over a text sees other noise, and a resume or another number of ranks sees the
same. Validation is never noised.

A changed token is written again by the tokenizer, alone, so ids stay ids of text: ` The` becomes ` THE`, `
the`, `  The` or `\\nThe`, in however many ids that takes. No word is changed but in its letters' case, and
words stay apart. Behind a span that was left out the next token is not supervised, since it does not follow
from what the model sees. The token that opens a row's document, ends of text, and tokens that are not whole
characters stay as they are. A row that grew is cut at its length, one that shrank is padded, and padding is
not supervised.

Dropping spans is word dropout by spans (Bowman et al. 2016, arXiv:1511.06349, drops single words of the
input).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from llm_trainer.config.schema.data import DataConfig
from llm_trainer.data.sampling.batch import IGNORED, Batch, Sampler
from llm_trainer.data.sampling.permutation import combine
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.errors import DataError, UsageError

_STREAM = 2  # keeps these draws apart from those of the order

_CASES: tuple[Callable[[str], str], ...] = (
    str,
    str.lower,
    str.upper,
    str.title,
)  # the first leaves a token as it is
_SPACES: tuple[Callable[[str], str], ...] = (str, lambda text: " " + text, lambda text: "\n" + text[1:])


@dataclass(frozen=True)
class Augmentation:
    """How much noise: shares of the tokens left out in spans of `span_length` on average, and of the words
    changed, 0 … 1.
    """

    span_drop: float = 0.0
    span_length: int = 4
    case: float = 0.0
    whitespace: float = 0.0

    @classmethod
    def of(cls, config: DataConfig) -> Augmentation:
        """As the settings say."""
        return cls(
            config.augment_span_drop,
            config.augment_span_length,
            config.augment_case,
            config.augment_whitespace,
        )

    def __bool__(self) -> bool:
        return any((self.span_drop, self.case, self.whitespace))


def augmented(
    sampler: Sampler, augmentation: Augmentation, tokenizer: Tokenizer | None, seed: int
) -> Sampler:
    """The sampler with noise on its rows, or itself where none is asked for. Raises UsageError where noise
    needs a tokenizer.
    """
    if not augmentation:
        return sampler
    if tokenizer is None:
        raise UsageError(
            "augment_… changes text, and this data has no tokenizer; prepare it with one, or leave the noise out"
        )
    return AugmentedSampler(sampler, augmentation, tokenizer, seed)


class AugmentedSampler:
    """A sampler whose rows are noised; sample i's noise is a function of (seed, i)."""

    def __init__(self, sampler: Sampler, augmentation: Augmentation, tokenizer: Tokenizer, seed: int) -> None:
        self._sampler, self._augmentation, self._tokenizer, self._seed = (
            sampler,
            augmentation,
            tokenizer,
            seed,
        )
        self._written: dict[tuple[int, int, int], list[int]] = {}
        self.samples_per_epoch, self.tokens_per_sample, self.order = (
            sampler.samples_per_epoch,
            sampler.tokens_per_sample,
            sampler.order,
        )

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples `first_sample … first_sample + count - 1`, noised."""
        batch = self._sampler.batch(first_sample, count)
        inputs, labels = batch.input_ids.numpy().copy(), batch.labels.numpy().copy()
        documents = np.zeros_like(inputs) if batch.document_ids is None else batch.document_ids.numpy().copy()
        for row in range(count):
            generator = np.random.default_rng(combine(self._seed, first_sample + row, _STREAM))
            self._noise_row(inputs[row], labels[row], documents[row], generator)
        kept = None if batch.document_ids is None else torch.from_numpy(documents)
        supervised = int((labels != IGNORED).sum())
        return replace(
            batch,
            input_ids=torch.from_numpy(inputs),
            labels=torch.from_numpy(labels),
            document_ids=kept,
            num_supervised=supervised,
        )

    def _noise_row(
        self, inputs: np.ndarray, labels: np.ndarray, documents: np.ndarray, generator: np.random.Generator
    ) -> None:
        """Noise one row in place: each document's part by itself, then end to end again."""
        supervised = np.flatnonzero(labels != IGNORED)
        used = int(supervised[-1]) + 1 if len(supervised) else 0
        bounds = [0, *(np.flatnonzero(np.diff(documents[:used])) + 1).tolist(), used]
        parts = [
            self._noise(inputs[begin:end], labels[begin:end], generator)
            for begin, end in itertools.pairwise(bounds)
            if end > begin
        ]
        inputs[:], labels[:], documents[:] = 0, IGNORED, len(parts)
        place = 0
        for number, (ids, is_label) in enumerate(parts):
            size = min(len(ids) - 1, len(inputs) - place)
            here = slice(place, place + size)
            inputs[here] = ids[:size]
            labels[here] = np.where(is_label[1 : size + 1], ids[1 : size + 1], IGNORED)
            documents[here] = number
            place += size

    def _noise(
        self, inputs: np.ndarray, labels: np.ndarray, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids of one document's part after noise, and which of them are supervised as labels."""
        ids = np.append(inputs, labels[-1]) if labels[-1] != IGNORED else inputs
        is_label = np.append(False, labels != IGNORED)[: len(ids)]
        is_fixed = np.arange(len(ids)) == 0
        if self._tokenizer.eos_id is not None:
            is_fixed |= ids == self._tokenizer.eos_id
        kept = self._kept(len(ids), generator) | is_fixed
        is_label = is_label & np.append(True, kept[:-1])
        cases = self._draws(len(ids), self._augmentation.case, len(_CASES), generator)
        spaces = self._draws(len(ids), self._augmentation.whitespace, len(_SPACES), generator)
        cases[is_fixed], spaces[is_fixed] = 0, 0
        return self._written_again(ids[kept], cases[kept], spaces[kept], is_label[kept])

    def _written_again(
        self, ids: np.ndarray, cases: np.ndarray, spaces: np.ndarray, is_label: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Each token in the ids that it has after its change, and which of them are supervised: all of a
        token's, or none.
        """
        changed = np.flatnonzero(cases + spaces).tolist()
        written = {
            place: self._write(int(ids[place]), int(cases[place]), int(spaces[place])) for place in changed
        }
        counts = np.ones(len(ids), dtype=np.int64)
        for place, found in written.items():
            counts[place] = len(found)
        out, ends = np.repeat(ids, counts), np.cumsum(counts)
        for place, found in written.items():
            out[ends[place] - len(found) : ends[place]] = found
        return out, np.repeat(is_label, counts)

    def _kept(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """Which tokens stay: runs of kept and of left-out ones, of geometric lengths, in the shares that are
        asked for.
        """
        share, length = self._augmentation.span_drop, self._augmentation.span_length
        if not share:
            return np.ones(count, dtype=bool)
        leaves = min(
            1.0, share / (length * (1 - share))
        )  # chance that a kept token is the last before a span
        runs = np.stack([generator.geometric(leaves, count), generator.geometric(1 / length, count)], axis=1)
        states = np.tile([True, False], (count, 1))
        if generator.random() < share:  # it begins within a span
            runs, states = runs[:, ::-1], ~states
        kept: np.ndarray = np.repeat(states.flatten(), np.minimum(runs.flatten(), count))[:count]
        return kept

    @staticmethod
    def _draws(count: int, share: float, kinds: int, generator: np.random.Generator) -> np.ndarray:
        """For each token 0 (as it is) or, in `share` of the cases, which change is made."""
        if not share:
            return np.zeros(count, dtype=np.int64)
        return np.where(generator.random(count) < share, generator.integers(1, kinds, count), 0)

    def _write(self, token_id: int, case: int, space: int) -> list[int]:
        """The ids of a token's text after a change; itself where the change makes no difference or cannot be
        written.
        """
        key = (token_id, case, space)
        if key not in self._written:
            self._written[key] = self._rewritten(*key)
        return self._written[key]

    def _rewritten(self, token_id: int, case: int, space: int) -> list[int]:
        try:
            text = self._tokenizer.token_bytes(token_id).decode("utf-8")
        except UnicodeDecodeError:  # part of a character
            return [token_id]
        is_word = any(character.isalpha() for character in text)
        changed = _CASES[case](text) if is_word else text
        changed = _SPACES[space](changed) if changed.startswith(" ") else changed
        if changed == text or changed.casefold().split() != text.casefold().split():
            return [token_id]
        try:
            ids = self._tokenizer.encode(changed)
        except DataError:  # a table of characters that lacks one
            return [token_id]
        return ids if self._tokenizer.decode(ids) == changed else [token_id]
