"""Keys and values of the tokens already read, so that a new token costs one row of attention, not a whole
matrix.

Keys and values are one tensor each, allocated once: (layers, rows, kv heads, slots, head width). Slot i of a
row holds the token at position i, and a query at position p sees slots 0…p. So a slot beyond a row's own
length may hold anything, and a row is freed by writing the next sequence over it from position 0. Nothing is
shifted, concatenated or zeroed.

Rows at the same position (one sequence, or prompts of equal length) take the fast path, which writes a slice
and reads a slice. For rows at different positions the caller passes `positions`, which costs an indexed write
and a mask.

The cache is for inference: no gradient flows through it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.errors import UsageError


@dataclass(frozen=True)
class CachePosition:
    """Where the tokens of one forward pass go in the cache.

    They go to slots `start:stop` of every row, or to `positions` (B, T) where rows differ. `first` is the
    first slot that any of them sees: 0, or later where a sliding window has passed it.
    """

    start: int
    stop: int
    first: int = 0
    positions: Tensor | None = None


@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values, (B, kv heads, slots, D) each."""

    keys: Tensor
    values: Tensor

    def write(self, keys: Tensor, values: Tensor, position: CachePosition) -> tuple[Tensor, Tensor]:
        """Store new keys and values.

        Args:
            keys: (B, T, kv heads, D).
            values: (B, T, kv heads, D).
            position: Where they go.

        Returns:
            All keys and values that the new tokens may see, (B, kv heads, S, D) each.
        """
        if position.positions is None:
            self.keys[:, :, position.start : position.stop] = keys.detach().transpose(1, 2)
            self.values[:, :, position.start : position.stop] = values.detach().transpose(1, 2)
        else:
            rows = torch.arange(keys.size(0), device=keys.device)[:, None]
            self.keys[rows, :, position.positions] = keys.detach().to(self.keys.dtype)
            self.values[rows, :, position.positions] = values.detach().to(self.values.dtype)
        visible = slice(position.first, position.stop)
        return self.keys[:, :, visible], self.values[:, :, visible]


class KVCache:
    """Room for `batch_size` sequences of up to `max_length` tokens.

    `length` counts the tokens that all rows hold while they are at the same position.
    `Transformer.hidden_states(…, cache=cache)` without `positions` appends there and advances it. With
    `positions` the caller keeps count, and `length` does not change.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Allocate the cache.

        Args:
            config: The model's shape.
            batch_size: Rows.
            max_length: Slots per row.
            device: Where the tensors are.
            dtype: Their type.

        Raises:
            UsageError: `max_length` is larger than the model's context.
        """
        if max_length > config.max_position_embeddings:
            raise UsageError(
                f"a cache of {max_length} tokens is longer than the model's context of "
                f"{config.max_position_embeddings} tokens; allocate a shorter one"
            )
        heads = [
            config.block_config(layer).kv_heads for layer in range(config.num_hidden_layers)
        ]  # unequal after pruning
        shape = (config.num_hidden_layers, batch_size, max(heads), max_length, config.head_width)
        keys = torch.zeros(shape, device=device, dtype=dtype)
        values = torch.zeros(shape, device=device, dtype=dtype)
        self._adopt(keys, values, 0, heads)

    def _adopt(self, keys: Tensor, values: Tensor, length: int, heads: list[int]) -> None:
        self.keys, self.values, self.length, self._heads = keys, values, length, heads
        self.layers = [
            LayerCache(keys[layer, :, :count], values[layer, :, :count]) for layer, count in enumerate(heads)
        ]

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.keys.size(1)

    @property
    def max_length(self) -> int:
        """Slots per row."""
        return self.keys.size(3)

    @property
    def num_bytes(self) -> int:
        """Memory of both tensors, in bytes."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def row(self, index: int, length: int = 0) -> KVCache:
        """One row as a cache of its own, which uses this cache's memory.

        Args:
            index: The row.
            length: How many of its slots are already filled.

        Returns:
            A cache with one row.
        """
        view = object.__new__(KVCache)
        view._adopt(self.keys[:, index : index + 1], self.values[:, index : index + 1], length, self._heads)
        return view

    def select(self, rows: list[int]) -> KVCache:
        """Copy some rows to a new cache; this is how finished rows leave a batch."""
        chosen = object.__new__(KVCache)
        chosen._adopt(self.keys[:, rows], self.values[:, rows], self.length, self._heads)
        return chosen

    def reset(self) -> None:
        """Forget every token, without touching memory."""
        self.length = 0

    def locate(self, input_ids: Tensor, positions: Tensor | None, window: int | None) -> CachePosition:
        """Find the slots of the next tokens.

        Args:
            input_ids: The tokens, (B, T).
            positions: Where each of them goes, (B, T). None: behind the tokens that are there.
            window: The model's sliding window, in tokens.

        Returns:
            Where they go and which slots they see.

        Raises:
            UsageError: The batch has another number of rows than the cache, or the tokens do not fit.
        """
        batch, count = input_ids.shape
        if batch != self.batch_size:
            raise UsageError(f"a batch of {batch} rows does not fit a cache of {self.batch_size}")
        start = self.length if positions is None else 0
        stop = self.length + count if positions is None else int(positions.max()) + 1
        if stop > self.max_length:
            raise UsageError(
                f"{stop} tokens do not fit a cache of {self.max_length}; "
                "allocate a longer one, or shorten the prompt"
            )
        # A single new token needs no mask for a sliding window if the slots before the window are not even
        # read.
        first = max(0, stop - window) if window is not None and positions is None and count == 1 else 0
        return CachePosition(start, stop, first, positions)
