"""Wider MLPs, and a wider residual stream with more heads, keeping the function; `width_map` explains how."""

from __future__ import annotations

import torch

from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.errors import UsageError
from llm_trainer.model.surgery.model_state import ModelState
from llm_trainer.model.surgery.width_map import Changes, remap, repeat_index

# How much the readers of copies differ, in standard deviations of their matrix; their sum does not change.
DEFAULT_NOISE = 0.5


def widened_mlp_config(config: ModelConfig, width: int) -> ModelConfig:
    """The shape after `widen_mlp`.

    Raises:
        UsageError: The width is below the present one.
    """
    widest = max(config.mlp_hidden_sizes, default=config.mlp_width)
    if width < widest:
        raise UsageError(
            f"widen_mlp {width} is narrower than the MLP, which has {widest} units; use prune_mlp to "
            "shrink it"
        )
    return config.model_copy(update={"intermediate_size": width, "mlp_hidden_sizes": []})


def widen_mlp(
    state: ModelState,
    width: int,
    *,
    noise: float = DEFAULT_NOISE,
    generator: torch.Generator | None = None,
) -> ModelState:
    """Widen every MLP by copying units and dividing what reads them; the function is kept.

    Args:
        state: The present model.
        width: The new number of units.
        noise: How much the readers of copies differ, in standard deviations of their matrix.
        generator: Source of the noise. None: torch's global one.

    Returns:
        The wider model.

    Raises:
        UsageError: The width is below the present one.
    """
    config = widened_mlp_config(state.config, width)
    blocks = range(config.num_hidden_layers)
    changes: Changes = {
        (block, "mlp"): repeat_index(state.config.block_config(block).mlp_width, width) for block in blocks
    }
    return remap(state, config, changes, noise=noise, generator=generator)


def widened_model_config(
    config: ModelConfig, hidden_size: int, heads: int | None = None, *, approximate: bool = False
) -> ModelConfig:
    """The shape after `widen_model`.

    MLPs keep their width, key-value heads grow as the query heads do, and the width of a head stays.

    Args:
        config: The present shape.
        hidden_size: The new width of the residual stream, in features.
        heads: The new number of query heads. None: they grow in proportion to the width.
        approximate: Allow sizes that change the function.

    Returns:
        The new shape.

    Raises:
        UsageError: The sizes would not keep the function and `approximate` is false, or no model can have
            them.
    """
    old, width, group = config.hidden_size, config.head_width, config.num_attention_heads // config.kv_heads
    if config.kv_heads_per_layer:
        raise UsageError(
            f"widen_model needs blocks with equally many heads, and these were pruned to "
            f"{config.kv_heads_per_layer} key-value heads"
        )
    heads = heads or config.num_attention_heads * hidden_size // old
    if hidden_size < old or heads < config.num_attention_heads:
        raise UsageError(
            f"widen_model [{hidden_size}, {heads}] is narrower than the model, which has {old} features and "
            f"{config.num_attention_heads} heads"
        )
    if heads % group:
        raise UsageError(
            f"widen_model: {heads} heads cannot be divided into groups of {group} per key-value head; "
            f"give a multiple of {group}"
        )
    keeps_heads = config.head_dim is not None or hidden_size == heads * width
    exact = hidden_size % old == 0 and heads % config.num_attention_heads == 0 and keeps_heads
    if not exact and not approximate:
        raise UsageError(
            f"widen_model [{hidden_size}, {heads}] cannot keep the function: the width must be a multiple of "
            f"{old}, the heads of {config.num_attention_heads}, each {width} wide; give such sizes, or set "
            "approximate: true"
        )
    return config.model_copy(
        update={
            "hidden_size": hidden_size,
            "num_attention_heads": heads,
            "num_key_value_heads": None if config.num_key_value_heads is None else heads // group,
            "head_dim": config.head_dim if hidden_size == heads * width else width,
            "intermediate_size": config.mlp_width,
        }
    )


def widen_model(
    state: ModelState,
    hidden_size: int,
    heads: int | None = None,
    *,
    approximate: bool = False,
    noise: float = DEFAULT_NOISE,
    generator: torch.Generator | None = None,
) -> ModelState:
    """Widen the residual stream by copying features and heads and dividing what reads them.

    The function is kept for multiples; other widths change the statistics that norms see.

    Args:
        state: The present model.
        hidden_size: The new width of the residual stream, in features.
        heads: The new number of query heads. None: they grow in proportion to the width.
        approximate: Allow sizes that change the function.
        noise: How much the readers of copies differ, in standard deviations of their matrix.
        generator: Source of the noise. None: torch's global one.

    Returns:
        The wider model.

    Raises:
        UsageError: As `widened_model_config`.
    """
    old = state.config
    config = widened_model_config(old, hidden_size, heads, approximate=approximate)
    width = config.head_width
    query_index = repeat_index(old.num_attention_heads * width, config.num_attention_heads * width, width)
    changes: Changes = {
        (None, "hidden"): repeat_index(old.hidden_size, config.hidden_size),
        (None, "heads"): query_index,
        (None, "kv"): repeat_index(old.kv_heads * width, config.kv_heads * width, width),
    }
    return remap(state, config, changes, noise=noise, generator=generator)
