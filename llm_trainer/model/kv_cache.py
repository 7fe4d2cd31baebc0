"""Keys and values of the tokens already read, so that each new token costs one row of attention and not a
whole square.

One tensor each for keys and values, allocated once: (layers, rows, kv heads, slots, head width). Slot i of a
row holds the token at position i, and a query at position p sees slots 0…p; so a slot beyond a row's own
length may hold anything, and a row is freed by writing the next sequence over it from position 0. Nothing is
shifted, concatenated or zeroed.

Rows that march together (one sequence, or prompts of equal length) take the fast path: a slice is written and
a slice is read. Rows at different positions say so with `positions`, which costs an indexed write and a mask.

The cache is for inference: no gradient flows through what it holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.errors import UsageError


@dataclass(frozen=True)
class Place:
    """Where the tokens of one forward pass stand: slots `start:stop` in every row, or `positions` (B, T)
    where rows differ.

    `first` is the first slot that anyone of them sees: 0, or later where a sliding window has passed it.
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

    def write(self, keys: Tensor, values: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, T, kv heads, D) and return all that may be seen, (B, kv heads, S, D)."""
        if place.positions is None:
            self.keys[:, :, place.start : place.stop] = keys.detach().transpose(1, 2)
            self.values[:, :, place.start : place.stop] = values.detach().transpose(1, 2)
        else:
            rows = torch.arange(keys.size(0), device=keys.device)[:, None]
            self.keys[rows, :, place.positions] = keys.detach().to(self.keys.dtype)
            self.values[rows, :, place.positions] = values.detach().to(self.values.dtype)
        return self.keys[:, :, place.first : place.stop], self.values[:, :, place.first : place.stop]


class KVCache:
    """Room for `batch_size` sequences of up to `max_length` tokens.

    `length` counts the tokens that all rows hold while they march together; `Transformer.hidden_states(…, cache=cache)` without
    `positions` appends there and moves it on. With `positions` the caller keeps the books and `length` stays as it is.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if max_length > config.max_position_embeddings:
            raise UsageError(
                f"a cache of {max_length} tokens is longer than the model's context of {config.max_position_embeddings}"
            )
        heads = [
            config.of_block(layer).kv_heads for layer in range(config.num_hidden_layers)
        ]  # unequal after pruning
        shape = (config.num_hidden_layers, batch_size, max(heads), max_length, config.head_width)
        self._adopt(
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(shape, device=device, dtype=dtype),
            0,
            heads,
        )

    def _adopt(self, keys: Tensor, values: Tensor, length: int, heads: list[int]) -> None:
        self.keys, self.values, self.length, self._heads = keys, values, length, heads
        self.layers = [
            LayerCache(keys[layer, :, :count], values[layer, :, :count]) for layer, count in enumerate(heads)
        ]

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.keys.size(1)

    @property
    def max_length(self) -> int:
        """Slots a row."""
        return self.keys.size(3)

    @property
    def num_bytes(self) -> int:
        """Memory of both tensors."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def row(self, index: int, length: int = 0) -> KVCache:
        """One row as a cache of its own that shares this one's memory; `length` says how many of its slots
        are already filled.
        """
        view = object.__new__(KVCache)
        view._adopt(self.keys[:, index : index + 1], self.values[:, index : index + 1], length, self._heads)
        return view

    def select(self, rows: list[int]) -> KVCache:
        """A cache of these rows alone, copied; how rows that have ended leave a batch."""
        chosen = object.__new__(KVCache)
        chosen._adopt(self.keys[:, rows], self.values[:, rows], self.length, self._heads)
        return chosen

    def reset(self) -> None:
        """Forget every token; no memory is touched."""
        self.length = 0

    def place(self, input_ids: Tensor, positions: Tensor | None, window: int | None) -> Place:
        """Where `input_ids` (B, T) go; raises UsageError where there is no room or the rows do not fit."""
        batch, count = input_ids.shape
        if batch != self.batch_size:
            raise UsageError(f"a batch of {batch} rows does not fit a cache of {self.batch_size}")
        start = self.length if positions is None else 0
        stop = self.length + count if positions is None else int(positions.max()) + 1
        if stop > self.max_length:
            raise UsageError(
                f"{stop} tokens do not fit a cache of {self.max_length}; allocate it longer, or shorten the prompt"
            )
        # A single new token needs no mask for a sliding window when the slots before the window are not even
        # read.
        first = max(0, stop - window) if window is not None and positions is None and count == 1 else 0
        return Place(start, stop, first, positions)
