"""Chooses the sampler for the data and the settings, and iterates over validation data.

Sample i is a function of the shards, the seed and i. A training order is windows over one stream
(`window_sampler.py`), rows of complete documents (`packed_rows.py`), or several corpora mixed (`mixture.py`).
Validation reads the same rows in order, each of them once.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rich.console import Console

from llm_trainer.config.schema.data import DataConfig
from llm_trainer.data.sampling.augmentation import Augmentation, with_augmentation
from llm_trainer.data.sampling.batch import Batch, Sampler, without_labels
from llm_trainer.data.sampling.mixture import MixtureDataset, MixtureSampler
from llm_trainer.data.sampling.packed_rows import PackedRows, PackedRowSampler
from llm_trainer.data.sampling.packing import Packing
from llm_trainer.data.sampling.window_sampler import WindowRows, WindowSampler
from llm_trainer.data.token_shards import TokenDataset
from llm_trainer.data.tokenization.tokenizer import Tokenizer
from llm_trainer.errors import DataError


def build_sampler(
    tokens: TokenDataset,
    context: int,
    seed: int,
    packing: Packing | None = None,
    *,
    sequences_per_step: int = 1,
    console: Console | None = None,
) -> Sampler:
    """Build the training order over a stream or a mixture.

    Args:
        tokens: The training data.
        context: Tokens per row.
        seed: Random seed of the order.
        packing: How documents become rows; greedy by default.
        sequences_per_step: Rows per optimizer step; converts mixture stages given in steps to samples.
        console: Shows progress of what takes longer than two seconds.

    Raises:
        DataError: The data is shorter than one row.
        UsageError: The settings do not fit the data.
    """
    packing = packing or Packing()
    if isinstance(tokens, MixtureDataset):
        members = {
            name: build_sampler(member, context, seed, packing, console=console)
            for name, member in tokens.members.items()
        }
        return MixtureSampler(
            members, tokens.stages, seed, context=context, sequences_per_step=sequences_per_step
        )
    if packing.strategy == "greedy":
        return WindowSampler(tokens, context, seed, packing.mask_documents, packing.stride)
    return PackedRowSampler(tokens, context, seed, packing, console)


def build_training_sampler(
    tokens: TokenDataset,
    context: int,
    seed: int,
    config: DataConfig,
    tokenizer: Tokenizer | None = None,
    *,
    sequences_per_step: int = 1,
    console: Console | None = None,
) -> Sampler:
    """Build the order of a training run, packed, mixed and augmented as the settings describe.

    Args:
        tokens: The training data.
        context: Tokens per row.
        seed: Random seed of the order and the augmentation.
        config: The data settings.
        tokenizer: Encodes augmented text; needed only with augmentation.
        sequences_per_step: Rows per optimizer step; converts mixture stages given in steps to samples.
        console: Shows progress of what takes longer than two seconds.

    Raises:
        DataError: The data is shorter than one row.
        UsageError: The settings do not fit the data.
    """
    sampler = build_sampler(
        tokens,
        context,
        seed,
        Packing.from_config(config),
        sequences_per_step=sequences_per_step,
        console=console,
    )
    return with_augmentation(sampler, Augmentation.from_config(config), tokenizer, seed)


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
    """Iterate over the rows of validation data in order.

    Every token is a label once, except for the first token of a stream under greedy packing, and the first
    token of a document where no end-of-text token precedes it. The last batch is padded with rows without
    labels if there were full batches before it, so that shapes stay the same and a compiled model is not
    recompiled.

    Args:
        tokens: The validation data.
        context: Tokens per row.
        batch_size: Rows per batch.
        limit: Number of batches, spread evenly over the data; None for all of it.
        packing: How documents become rows; greedy by default.
        rank: This rank reads every `ranks`-th batch.
        ranks: All ranks get equally many batches; those past the end have no labels.

    Raises:
        DataError: There is nothing to predict.
    """
    if tokens.num_tokens < 2:
        raise DataError(
            f"the validation split of {tokens.source} has {tokens.num_tokens} tokens;"
            " raise val_ratio, or give more text"
        )
    rows = _rows(tokens, context, packing)
    chosen = rows.count if limit is None else min(rows.count, limit * batch_size)
    numbers = np.arange(chosen, dtype=np.int64) * rows.count // max(1, chosen)
    for first in range(
        rank * batch_size, -(-chosen // (batch_size * ranks)) * batch_size * ranks, batch_size * ranks
    ):
        part = numbers[first : first + batch_size]
        if len(part) == 0:
            yield without_labels(rows.rows(numbers[:batch_size], rows=batch_size))
        else:
            yield rows.rows(part, rows=batch_size if first else len(part))


def validation_row_count(tokens: TokenDataset, context: int, packing: Packing | None = None) -> int:
    """Number of rows that `validation_batches` yields without a limit."""
    return _rows(tokens, context, packing).count


def _rows(tokens: TokenDataset, context: int, packing: Packing | None) -> WindowRows | PackedRows:
    packing = packing or Packing()
    return (
        WindowRows(tokens, context, packing)
        if packing.strategy == "greedy"
        else PackedRows(tokens, context, packing)
    )
