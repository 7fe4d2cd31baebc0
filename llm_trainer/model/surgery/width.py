"""Wider MLPs, and a wider residual stream with more heads, keeping the function (see `axes.py` for how)."""

from __future__ import annotations

import torch

from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.errors import UsageError
from llm_trainer.model.surgery.model_state import Form
from llm_trainer.model.surgery.width_map import Changes, sew, spread

SPLIT = 0.5
"""How much readers of copies differ, in standard deviations of their matrix; their sum does not."""


def widened_mlp_config(config: ModelConfig, width: int) -> ModelConfig:
    """The shape after `widen_mlp`. Raises UsageError for a width below the present one."""
    widest = max(config.mlp_widths, default=config.mlp_width)
    if width < widest:
        raise UsageError(
            f"widen_mlp {width} is narrower than the MLP, which has {widest} units; prune_mlp shrinks it"
        )
    return config.model_copy(update={"intermediate_size": width, "mlp_widths": []})


def widen_mlp(
    form: Form, width: int, *, noise: float = SPLIT, generator: torch.Generator | None = None
) -> Form:
    """MLPs of `width` units: units are copied, what reads them is divided by the copies. The function is
    kept. Raises UsageError.
    """
    config = widened_mlp_config(form.config, width)
    blocks = range(config.num_hidden_layers)
    changes: Changes = {
        (block, "mlp"): spread(form.config.of_block(block).mlp_width, width) for block in blocks
    }
    return sew(form, config, changes, noise=noise, generator=generator)


def widened_model_config(
    config: ModelConfig, hidden_size: int, heads: int | None = None, *, approximate: bool = False
) -> ModelConfig:
    """The shape after `widen_model`; `heads` None: as many more as the stream gets wider.

    MLPs keep their width, key-value heads grow as the query heads do, the size of a head stays. Raises
    UsageError for a width that would not keep the function, unless `approximate`, and for one that cannot be
    built.
    """
    old, width, group = config.hidden_size, config.head_width, config.num_attention_heads // config.kv_heads
    if config.kv_head_counts:
        raise UsageError(
            f"widen_model: blocks were pruned to {config.kv_head_counts} key-value heads, and only equal ones can be widened"
        )
    heads = heads or config.num_attention_heads * hidden_size // old
    if hidden_size < old or heads < config.num_attention_heads:
        raise UsageError(
            f"widen_model [{hidden_size}, {heads}] is narrower than the model, which has {old} features and "
            f"{config.num_attention_heads} heads"
        )
    if heads % group:
        raise UsageError(
            f"widen_model: {heads} heads do not divide into groups of {group} that share a key-value head; take a multiple"
        )
    keeps_heads = config.head_dim is not None or hidden_size == heads * width
    exact = hidden_size % old == 0 and heads % config.num_attention_heads == 0 and keeps_heads
    if not exact and not approximate:
        raise UsageError(
            f"widen_model [{hidden_size}, {heads}] cannot keep the function: the width must be a multiple of {old}, the heads of "
            f"{config.num_attention_heads}, each {width} wide; take such, or say approximate: true"
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
    form: Form,
    hidden_size: int,
    heads: int | None = None,
    *,
    approximate: bool = False,
    noise: float = SPLIT,
    generator: torch.Generator | None = None,
) -> Form:
    """A residual stream of `hidden_size` features and `heads` heads: features and heads are copied, their
    readers divided.

    The function is kept for multiples; other widths change the statistics that norms see. Raises as
    `widened_model_config`.
    """
    old, config = form.config, widened_model_config(form.config, hidden_size, heads, approximate=approximate)
    width = config.head_width
    changes: Changes = {
        (None, "hidden"): spread(old.hidden_size, config.hidden_size),
        (None, "heads"): spread(old.num_attention_heads * width, config.num_attention_heads * width, width),
        (None, "kv"): spread(old.kv_heads * width, config.kv_heads * width, width),
    }
    return sew(form, config, changes, noise=noise, generator=generator)
