"""How much arithmetic a token costs, from the shape alone. Needs no torch.

The formula is PaLM's (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), which MFU figures of the field
are counted by: training takes 6 FLOPs per token and matrix weight (2 forward, 4 backward) and 12·L·H·D·S for
attention's two products over S visible tokens. PaLM counts S as the whole context though a causal mask hides
half of it; `causal=True` counts what is seen. The recomputation of gradient checkpointing is not counted: MFU
is about useful work.
"""

from __future__ import annotations

from llm_trainer.config.param_count import parameter_count, part_sizes
from llm_trainer.config.schema.model import ModelConfig

__all__ = ["attention_span", "estimate_flops", "matrix_parameters", "parameter_count", "part_sizes"]


def estimate_flops(config: ModelConfig, context: int, *, causal: bool = False) -> float:
    """FLOPs that training on one token takes, forward and backward, in sequences of `context` tokens.

        6·N + 12·L·H·D·S        (PaLM: S = context; causal: S = the mean number of tokens that a token sees)

    N: weights that a token is multiplied with: all but position embeddings, and the embedding only where it
    is the head as well. L layers, H query heads, D width of a head. A sliding window bounds S. The forward
    pass alone is a third of it.
    """
    heads = sum(config.of_block(layer).num_attention_heads for layer in range(config.num_hidden_layers))
    attention = heads * config.head_width * attention_span(config, context, causal=causal)
    return 6.0 * matrix_parameters(config) + 12.0 * attention


def matrix_parameters(config: ModelConfig) -> int:
    """Weights that every token is multiplied with; looking a row up in an embedding is no arithmetic."""
    sizes = part_sizes(config)
    lookups = sizes.get("wpe", 0) + (0 if config.tie_word_embeddings else sizes["wte"])
    return sum(sizes.values()) - lookups


def attention_span(config: ModelConfig, context: int, *, causal: bool) -> float:
    """Tokens that attention is counted over for each token: the context or window, or with `causal` the mean
    of what is visible.
    """
    window = min(config.sliding_window or context, context)
    if not causal:
        return float(window)
    return (window * (window + 1) / 2 + (context - window) * window) / context
