"""From shards to batches: sample i is a function of the shards, the seed and i.

Which sampler it is, follows from the data and the settings: windows over one stream (`windows.py`), rows of
whole documents (`rows.py`), or several corpora mixed (`mixture.py`). Validation shows the same rows in their
order, each once.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rich.console import Console

from llm_trainer.config.schema.data import DataConfig
from llm_trainer.data.sampling.augmentation import Augmentation, augmented
from llm_trainer.data.sampling.batch import IGNORED, Batch, Sampler, unsupervised
from llm_trainer.data.sampling.mixture import MixtureSampler, TokenMixture
from llm_trainer.data.sampling.packed_rows import PackedRows, RowSampler
from llm_trainer.data.sampling.packing import Packing
from llm_trainer.data.sampling.prefetch import Prefetcher
from llm_trainer.data.sampling.window_sampler import Windows, WindowSampler, require_window
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.errors import DataError

__all__ = [
    "IGNORED", "Batch", "Prefetcher", "Sampler", "WindowSampler", "open_sampler", "require_window", "training_sampler",
    "validation_batches", "validation_row_count",
]  # fmt: skip


def open_sampler(
    tokens: TokenDataset,
    context: int,
    seed: int,
    packing: Packing | None = None,
    *,
    sequences_per_step: int = 1,
    console: Console | None = None,
) -> Sampler:
    """The training order over a stream or a mixture; `sequences_per_step` is what stages given in steps are
    counted by.

    What takes longer than two seconds is shown on `console`. Raises DataError where the data is shorter than
    one row, UsageError for settings that do not fit it.
    """
    packing = packing or Packing()
    if isinstance(tokens, TokenMixture):
        members = {
            name: open_sampler(member, context, seed, packing, console=console)
            for name, member in tokens.members.items()
        }
        return MixtureSampler(
            members, tokens.stages, seed, context=context, sequences_per_step=sequences_per_step
        )
    if packing.strategy == "greedy":
        return WindowSampler(tokens, context, seed, packing.mask_documents, packing.stride)
    return RowSampler(tokens, context, seed, packing, console)


def training_sampler(
    tokens: TokenDataset,
    context: int,
    seed: int,
    config: DataConfig,
    tokenizer: Tokenizer | None = None,
    *,
    sequences_per_step: int = 1,
    console: Console | None = None,
) -> Sampler:
    """The order of a training run: packed, mixed and noised as the settings say. `tokenizer` writes the
    noise; raises as `open_sampler`.
    """
    sampler = open_sampler(
        tokens, context, seed, Packing.of(config), sequences_per_step=sequences_per_step, console=console
    )
    return augmented(sampler, Augmentation.of(config), tokenizer, seed)


def validation_batches(
    tokens: TokenDataset,
    context: int,
    batch_size: int,
    limit: int | None = None,
    packing: Packing | None = None,
    *,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Batch]:
    """All rows in order; with `limit`, that many batches spread evenly over them.

    Of several `ranks` each takes every so-many-th batch. All get equally many: those past the end are rows
    without labels.

    Every token is a label once, but for a stream's first under greedy and a document's first where no end of
    text opens it. The last batch is filled with rows without labels where there were full ones before it, so
    that shapes stay the same (a compiled model is not compiled again). Raises DataError where there is
    nothing to predict.
    """
    if tokens.num_tokens < 2:
        raise DataError(
            f"the validation split of {tokens.source} has {tokens.num_tokens} tokens; raise val_ratio, or give more text"
        )
    rows = _rows(tokens, context, packing)
    chosen = rows.count if limit is None else min(rows.count, limit * batch_size)
    numbers = np.arange(chosen, dtype=np.int64) * rows.count // max(1, chosen)
    for first in range(
        rank * batch_size, -(-chosen // (batch_size * ranks)) * batch_size * ranks, batch_size * ranks
    ):
        part = numbers[first : first + batch_size]
        if len(part) == 0:
            yield unsupervised(rows.rows(numbers[:batch_size], rows=batch_size))
        else:
            yield rows.rows(part, rows=batch_size if first else len(part))


def validation_row_count(tokens: TokenDataset, context: int, packing: Packing | None = None) -> int:
    """How many rows `validation_batches` shows."""
    return _rows(tokens, context, packing).count


def _rows(tokens: TokenDataset, context: int, packing: Packing | None) -> Windows | PackedRows:
    packing = packing or Packing()
    return (
        Windows(tokens, context, packing)
        if packing.strategy == "greedy"
        else PackedRows(tokens, context, packing)
    )
