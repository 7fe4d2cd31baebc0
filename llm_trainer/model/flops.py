"""How many floating-point operations a token costs, from the shape alone. Needs no torch.

The formula is PaLM's (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), by which the field counts its MFU
figures. Training takes 6 FLOPs per token and matrix weight (2 forward, 4 backward), and 12·L·H·D·S for
attention's two products over S visible tokens. PaLM counts S as the whole context though a causal mask hides
half of it; `causal=True` counts what is visible. The recomputation of activation checkpointing is not
counted, because MFU is about useful work.
"""

from __future__ import annotations

from llm_trainer.config.param_count import params_per_module
from llm_trainer.config.schema.model import ModelConfig


def estimate_flops(config: ModelConfig, context: int, *, causal: bool = False) -> float:
    """FLOPs of training on one token, forward and backward.

        6·N + 12·L·H·D·S

    N are the weights that a token is multiplied with: all but position embeddings, and the token embedding
    only where it is the head as well. L layers, H query heads, D width of a head. S is the context, or with
    `causal` the mean number of tokens that a token sees; a sliding window bounds it. The forward pass alone
    is a third.

    Args:
        config: The model's shape.
        context: Length of the sequences, in tokens.
        causal: Count only the tokens that the causal mask leaves visible.

    Returns:
        FLOPs per token.
    """
    heads = sum(config.block_config(layer).num_attention_heads for layer in range(config.num_hidden_layers))
    attention = heads * config.head_width * attention_span(config, context, causal=causal)
    return 6.0 * matrix_parameters(config) + 12.0 * attention


def matrix_parameters(config: ModelConfig) -> int:
    """Weights that every token is multiplied with; looking up a row of an embedding is no arithmetic."""
    sizes = params_per_module(config)
    lookups = sizes.get("wpe", 0) + (0 if config.tie_word_embeddings else sizes["wte"])
    return sum(sizes.values()) - lookups


def attention_span(config: ModelConfig, context: int, *, causal: bool) -> float:
    """Tokens per token that attention is counted over.

    Args:
        config: The model's shape.
        context: Length of the sequences, in tokens.
        causal: Take the mean of what is visible; otherwise the whole context or window.

    Returns:
        A number of tokens.
    """
    window = min(config.sliding_window or context, context)
    if not causal:
        return float(window)
    return (window * (window + 1) / 2 + (context - window) * window) / context
