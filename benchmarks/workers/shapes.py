"""The shapes for the training benchmarks, and random tokens for them.

This module imports nothing from llm_trainer, because the peers' environments import it too.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A GPT-2-like network (learned or rotary positions, LayerNorm, exact GELU, biases, no dropout) and a
    batch.
    """

    layers: int
    heads: int
    width: int
    vocabulary: int
    context: int
    batch: int
    tied: bool
    in_words: str

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.batch * self.context


SHAPES = {
    "0.8M": Shape(4, 4, 128, 65, 64, 12, True, "4 layers, 128 wide, context 64, batch 12"),
    "10.7M": Shape(6, 6, 384, 65, 256, 16, True, "6 layers, 384 wide, context 256, batch 16"),
    "vocabulary-50k": Shape(
        6, 8, 256, 50304, 512, 4, False, "6 layers, 256 wide, vocabulary 50304 untied, context 512, batch 4"
    ),
}
