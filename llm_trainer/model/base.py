"""What the rest of the package may rely on in a model: the names of its parts, without how they compute.

Part names, adapters, quantization and checkpoints work on this class, and `transformer.Transformer` is built
on them. So neither imports the other.
"""

from __future__ import annotations

from torch import nn

from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.model.layers import Embedding, Linear
from llm_trainer.model.positional import RotaryEmbedding


class TransformerBase(nn.Module):
    """The parts of a transformer, by their attribute names.

    `wpe` and `rotary` are None where the model has no such position embedding; `ln_f` is an Identity where
    the last block normalizes its own output (post-norm).
    """

    config: ModelConfig
    wte: Embedding
    wpe: Embedding | None
    rotary: RotaryEmbedding | None
    blocks: nn.ModuleList
    ln_f: nn.Module
    lm_head: Linear

    def tie_weights(self) -> None:
        """Let the head use the embedding's matrix, if `tie_word_embeddings` is set."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight
