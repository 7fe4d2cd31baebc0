"""Augments the training text: drops spans and changes case and whitespace. It is off by default.

Augmentation keeps a model from memorising a small corpus. It is applied to the ids of a row when the row is
read. Sample i is augmented by a generator that is seeded with (seed, i), so each epoch sees other changes,
and a resumed run or another number of ranks sees the same ones. Validation data is never augmented.

A changed token is encoded again by the tokenizer, alone, so the ids are always ids of text: ` The` becomes
` THE`, ` the`, `  The` or `\\nThe`, in as many ids as that takes. Words change in nothing but the case of
their letters, and stay separate. The token after a dropped span is not supervised, since it does not follow
from what the model sees. The first token of each document in a row, end-of-text tokens, and tokens that are
not complete characters stay as they are. A row that became longer is cut at its length; one that became
shorter is padded, and padding is not supervised.

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
from llm_trainer.data.hashing import derive_key
from llm_trainer.data.sampling.batch import IGNORE_INDEX, Batch, Sampler
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.errors import DataError, UsageError

_STREAM = 2  # makes these draws independent of those of the order

# The first function of each tuple leaves a token as it is.
_CASES: tuple[Callable[[str], str], ...] = (str, str.lower, str.upper, str.title)
_SPACES: tuple[Callable[[str], str], ...] = (str, lambda text: " " + text, lambda text: "\n" + text[1:])


@dataclass(frozen=True)
class Augmentation:
    """How much of the text is changed.

    Attributes:
        span_drop: Fraction of the tokens that are dropped, in spans.
        span_length: Tokens per dropped span, on average.
        case: Fraction of the words whose case is changed.
        whitespace: Fraction of the words whose preceding whitespace is changed.
    """

    span_drop: float = 0.0
    span_length: int = 4
    case: float = 0.0
    whitespace: float = 0.0

    @classmethod
    def from_config(cls, config: DataConfig) -> Augmentation:
        """The augmentation that the settings describe."""
        return cls(
            config.augment_span_drop,
            config.augment_span_length,
            config.augment_case,
            config.augment_whitespace,
        )

    def __bool__(self) -> bool:
        return any((self.span_drop, self.case, self.whitespace))


def with_augmentation(
    sampler: Sampler, augmentation: Augmentation, tokenizer: Tokenizer | None, seed: int
) -> Sampler:
    """Wrap a sampler so that its rows are augmented.

    Args:
        sampler: The training order.
        augmentation: What to change; without any change the sampler itself is returned.
        tokenizer: Encodes changed tokens.
        seed: Random seed of the changes.

    Raises:
        UsageError: The data has no tokenizer.
    """
    if not augmentation:
        return sampler
    if tokenizer is None:
        raise UsageError(
            "augmentation needs a tokenizer, and this data has none; prepare the data with a tokenizer,"
            " or set augment_span_drop, augment_case and augment_whitespace to 0"
        )
    return AugmentedSampler(sampler, augmentation, tokenizer, seed)


class AugmentedSampler:
    """A sampler whose rows are augmented; the changes of sample i are a function of (seed, i)."""

    def __init__(self, sampler: Sampler, augmentation: Augmentation, tokenizer: Tokenizer, seed: int) -> None:
        self._sampler, self._augmentation, self._tokenizer, self._seed = (
            sampler,
            augmentation,
            tokenizer,
            seed,
        )
        self._rewritten: dict[tuple[int, int, int], list[int]] = {}
        self.samples_per_epoch, self.tokens_per_sample, self.order = (
            sampler.samples_per_epoch,
            sampler.tokens_per_sample,
            sampler.order,
        )

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples `first_sample … first_sample + count - 1`, augmented."""
        batch = self._sampler.batch(first_sample, count)
        inputs, labels = batch.input_ids.numpy().copy(), batch.labels.numpy().copy()
        documents = np.zeros_like(inputs) if batch.document_ids is None else batch.document_ids.numpy().copy()
        for row in range(count):
            generator = np.random.default_rng(derive_key(self._seed, first_sample + row, _STREAM))
            self._augment_row(inputs[row], labels[row], documents[row], generator)
        kept = None if batch.document_ids is None else torch.from_numpy(documents)
        supervised = int((labels != IGNORE_INDEX).sum())
        return replace(
            batch,
            input_ids=torch.from_numpy(inputs),
            labels=torch.from_numpy(labels),
            document_ids=kept,
            num_supervised=supervised,
        )

    def _augment_row(
        self, inputs: np.ndarray, labels: np.ndarray, documents: np.ndarray, generator: np.random.Generator
    ) -> None:
        """Augment one row in place: each document alone, then concatenated again."""
        supervised = np.flatnonzero(labels != IGNORE_INDEX)
        used = int(supervised[-1]) + 1 if len(supervised) else 0
        bounds = [0, *(np.flatnonzero(np.diff(documents[:used])) + 1).tolist(), used]
        parts = [
            self._augment_document(inputs[begin:end], labels[begin:end], generator)
            for begin, end in itertools.pairwise(bounds)
            if end > begin
        ]
        inputs[:], labels[:], documents[:] = 0, IGNORE_INDEX, len(parts)
        position = 0
        for number, (ids, is_label) in enumerate(parts):
            size = min(len(ids) - 1, len(inputs) - position)
            here = slice(position, position + size)
            inputs[here] = ids[:size]
            labels[here] = np.where(is_label[1 : size + 1], ids[1 : size + 1], IGNORE_INDEX)
            documents[here] = number
            position += size

    def _augment_document(
        self, inputs: np.ndarray, labels: np.ndarray, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a document after augmentation, and which of them are supervised as labels."""
        ids = np.append(inputs, labels[-1]) if labels[-1] != IGNORE_INDEX else inputs
        is_label = np.append(False, labels != IGNORE_INDEX)[: len(ids)]
        is_fixed = np.arange(len(ids)) == 0
        if self._tokenizer.eos_id is not None:
            is_fixed |= ids == self._tokenizer.eos_id
        if self._tokenizer.prefix_ids:
            is_fixed |= np.isin(ids, self._tokenizer.prefix_ids)
        kept = self._kept(len(ids), generator) | is_fixed
        is_label = is_label & np.append(True, kept[:-1])
        cases = self._draws(len(ids), self._augmentation.case, len(_CASES), generator)
        spaces = self._draws(len(ids), self._augmentation.whitespace, len(_SPACES), generator)
        cases[is_fixed], spaces[is_fixed] = 0, 0
        return self._rewrite(ids[kept], cases[kept], spaces[kept], is_label[kept])

    def _rewrite(
        self, ids: np.ndarray, cases: np.ndarray, spaces: np.ndarray, is_label: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Replace each changed token by its new ids, all or none of which are supervised."""
        changed = np.flatnonzero(cases + spaces).tolist()
        written = {
            index: self._rewrite_token(int(ids[index]), int(cases[index]), int(spaces[index]))
            for index in changed
        }
        counts = np.ones(len(ids), dtype=np.int64)
        for index, found in written.items():
            counts[index] = len(found)
        out, ends = np.repeat(ids, counts), np.cumsum(counts)
        for index, found in written.items():
            out[ends[index] - len(found) : ends[index]] = found
        return out, np.repeat(is_label, counts)

    def _kept(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """Which tokens are kept: alternating runs of kept and dropped tokens with geometric lengths."""
        fraction, length = self._augmentation.span_drop, self._augmentation.span_length
        if not fraction:
            return np.ones(count, dtype=bool)
        # The probability that a kept token is the last one before a dropped span.
        ends = min(1.0, fraction / (length * (1 - fraction)))
        runs = np.stack([generator.geometric(ends, count), generator.geometric(1 / length, count)], axis=1)
        states = np.tile([True, False], (count, 1))
        if generator.random() < fraction:  # the text begins within a dropped span
            runs, states = runs[:, ::-1], ~states
        kept: np.ndarray = np.repeat(states.flatten(), np.minimum(runs.flatten(), count))[:count]
        return kept

    @staticmethod
    def _draws(count: int, fraction: float, kinds: int, generator: np.random.Generator) -> np.ndarray:
        """The change of each token: 0 for none or, for `fraction` of the tokens, a number below `kinds`."""
        if not fraction:
            return np.zeros(count, dtype=np.int64)
        return np.where(generator.random(count) < fraction, generator.integers(1, kinds, count), 0)

    def _rewrite_token(self, token_id: int, case: int, space: int) -> list[int]:
        """The ids of a token's text after a change, from the cache if it has been computed before."""
        key = (token_id, case, space)
        if key not in self._rewritten:
            self._rewritten[key] = self._encode_changed(*key)
        return self._rewritten[key]

    def _encode_changed(self, token_id: int, case: int, space: int) -> list[int]:
        """The ids after a change; the token itself if the change has no effect or cannot be encoded."""
        try:
            text = self._tokenizer.token_bytes(token_id).decode("utf-8")
        except UnicodeDecodeError:  # the token is part of a character
            return [token_id]
        is_word = any(character.isalpha() for character in text)
        changed = _CASES[case](text) if is_word else text
        changed = _SPACES[space](changed) if changed.startswith(" ") else changed
        if changed == text or changed.casefold().split() != text.casefold().split():
            return [token_id]
        try:
            ids = self._tokenizer.encode(changed)
        except DataError:  # the character tokenizer lacks a character
            return [token_id]
        return ids if self._tokenizer.decode(ids) == changed else [token_id]
