"""Fewer heads or MLP units; the least important are removed first (Michel et al. 2019, arXiv:1905.10650, for
heads).

The importance of a head or a unit is the size of what it can do: the norm of its output weights times the
norm of its input weights. Blocks may end up with unequal widths, which the shape records block by block
(`mlp_hidden_sizes`, `kv_heads_per_layer`). Where several query heads use one key-value head, the whole group
is removed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.errors import UsageError
from llm_trainer.model.module_names import matching_parts
from llm_trainer.model.surgery.model_state import ModelState
from llm_trainer.model.surgery.width_map import remap
from llm_trainer.model.transformer import Transformer


def prune_mlp(state: ModelState, part: str, fraction: float) -> ModelState:
    """Remove a fraction of an MLP's units.

    Args:
        state: The present model.
        part: `mlp.N`, or a range or glob of such parts, from each of which the fraction is removed.
        fraction: Between 0 and 1; at least one unit is removed.

    Returns:
        The smaller model.

    Raises:
        UsageError: The part does not exist or is no MLP, or nothing of it would be left.
    """
    config = state.config
    changes: dict[tuple[int | None, str], Tensor] = {}
    widths = [config.block_config(block).mlp_width for block in range(config.num_hidden_layers)]
    for block in _blocks(config, part, "mlp"):
        prefix = f"blocks.{block}.mlp."
        inputs = state.weights[prefix + "up_proj.weight"].float().norm(dim=1)
        if prefix + "gate_proj.weight" in state.weights:
            inputs = inputs * state.weights[prefix + "gate_proj.weight"].float().norm(dim=1)
        outputs = state.weights[prefix + "down_proj.weight"].float().norm(dim=0)
        index = _kept(inputs * outputs, fraction)
        widths[block], changes[block, "mlp"] = len(index), index
    return remap(state, _with_widths(config, widths), changes)


def prune_heads(state: ModelState, part: str, fraction: float) -> ModelState:
    """Remove a fraction of an attention's heads, under grouped-query attention whole groups of them.

    Args:
        state: The present model.
        part: `attn.N`, or a range or glob of such parts, from each of which the fraction is removed.
        fraction: Between 0 and 1; at least one key-value head is removed.

    Returns:
        The smaller model.

    Raises:
        UsageError: The part does not exist or is no attention, or nothing of it would be left.
    """
    config = state.config
    changes: dict[tuple[int | None, str], Tensor] = {}
    counts = [config.block_config(block).kv_heads for block in range(config.num_hidden_layers)]
    width, group = config.head_width, config.num_attention_heads // config.kv_heads
    for block in _blocks(config, part, "attn"):
        prefix = f"blocks.{block}.attn."
        values = state.weights[prefix + "v_proj.weight"].float().reshape(counts[block], -1).norm(dim=1)
        outputs = state.weights[prefix + "o_proj.weight"].float().T.reshape(counts[block], -1).norm(dim=1)
        index = _kept(values * outputs, fraction)
        counts[block] = len(index)
        changes[block, "kv"] = _of_heads(index, width)
        changes[block, "heads"] = _of_heads(index, width * group)
    return remap(state, _with_kv_heads(config, counts), changes)


def _blocks(config: ModelConfig, part: str, kind: str) -> list[int]:
    with torch.device("meta"):
        names = matching_parts(Transformer(config), part)
    wrong = [name for name in names if name.partition(".")[0] != kind]
    if wrong:
        raise UsageError(
            f"{wrong[0]} has no {'heads' if kind == 'attn' else 'units'} to prune; name {kind}.N"
        )
    return [int(name.partition(".")[2]) for name in names]


def _kept(importance: Tensor, fraction: float) -> Tensor:
    """The entries that stay, in their order: all but the least important; at least one goes and one stays."""
    count = len(importance)
    kept = count - max(1, int(fraction * count))
    if kept < 1:
        raise UsageError(f"pruning a fraction of {fraction:g} leaves nothing of {count}; give a smaller one")
    if importance.is_meta:
        return torch.arange(kept)
    return importance.cpu().topk(kept).indices.sort().values


def _of_heads(index: Tensor, width: int) -> Tensor:
    return (index[:, None] * width + torch.arange(width)).flatten()


def _with_widths(config: ModelConfig, widths: list[int]) -> ModelConfig:
    if len(set(widths)) == 1:
        return config.model_copy(update={"intermediate_size": widths[0], "mlp_hidden_sizes": []})
    return config.model_copy(update={"intermediate_size": config.mlp_width, "mlp_hidden_sizes": widths})


def _with_kv_heads(config: ModelConfig, counts: list[int]) -> ModelConfig:
    group = config.num_attention_heads // config.kv_heads
    if len(set(counts)) == 1:
        new = {
            "num_attention_heads": counts[0] * group,
            "num_key_value_heads": counts[0],
            "kv_heads_per_layer": [],
        }
    else:
        new = {"kv_heads_per_layer": counts}
    return config.model_copy(update={"head_dim": config.head_width, **new})
