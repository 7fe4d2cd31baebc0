"""Fewer heads or MLP units, those that matter least going first (Michel et al. 2019, arXiv:1905.10650, for
heads).

What a head or a unit matters is the size of what it can do: the norm of what it writes times the norm of what
it writes from. Blocks may come to have unequal widths, which the shape says block by block (`mlp_widths`,
`kv_head_counts`). Where queries share key-value heads, whole groups go.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.errors import UsageError
from llm_trainer.model.module_names import matching_parts
from llm_trainer.model.surgery.model_state import Form
from llm_trainer.model.surgery.width_map import sew
from llm_trainer.model.transformer import Transformer


def prune_mlp(form: Form, part: str, share: float) -> Form:
    """The form without this share of the units of `mlp.N` (a range or glob: of each). Raises UsageError for
    other parts.
    """
    config = form.config
    changes: dict[tuple[int | None, str], Tensor] = {}
    widths = [config.of_block(block).mlp_width for block in range(config.num_hidden_layers)]
    for block in _blocks(config, part, "mlp"):
        prefix = f"blocks.{block}.mlp."
        reads = form.weights[prefix + "up_proj.weight"].float().norm(dim=1)
        if prefix + "gate_proj.weight" in form.weights:
            reads = reads * form.weights[prefix + "gate_proj.weight"].float().norm(dim=1)
        index = _kept(reads * form.weights[prefix + "down_proj.weight"].float().norm(dim=0), share)
        widths[block], changes[block, "mlp"] = len(index), index
    return sew(form, _with_widths(config, widths), changes)


def prune_heads(form: Form, part: str, share: float) -> Form:
    """The form without this share of the heads of `attn.N` (a range or glob: of each), whole groups under
    GQA. Raises UsageError.
    """
    config = form.config
    changes: dict[tuple[int | None, str], Tensor] = {}
    counts = [config.of_block(block).kv_heads for block in range(config.num_hidden_layers)]
    width, group = config.head_width, config.num_attention_heads // config.kv_heads
    for block in _blocks(config, part, "attn"):
        prefix = f"blocks.{block}.attn."
        values = form.weights[prefix + "v_proj.weight"].float().reshape(counts[block], -1).norm(dim=1)
        outputs = form.weights[prefix + "o_proj.weight"].float().T.reshape(counts[block], -1).norm(dim=1)
        index = _kept(values * outputs, share)
        counts[block] = len(index)
        changes[block, "kv"] = _of_heads(index, width)
        changes[block, "heads"] = _of_heads(index, width * group)
    return sew(form, _with_kv_heads(config, counts), changes)


def _blocks(config: ModelConfig, part: str, kind: str) -> list[int]:
    with torch.device("meta"):
        names = matching_parts(Transformer(config), part)
    wrong = [name for name in names if name.partition(".")[0] != kind]
    if wrong:
        raise UsageError(
            f"{wrong[0]} has no {'heads' if kind == 'attn' else 'units'} to prune; name {kind}.N"
        )
    return [int(name.partition(".")[2]) for name in names]


def _kept(importance: Tensor, share: float) -> Tensor:
    """Which entries stay, in their order: all but the least important, one at least going and one at least
    staying.
    """
    count = len(importance)
    kept = count - max(1, int(share * count))
    if kept < 1:
        raise UsageError(f"a share of {share:g} leaves nothing of {count}")
    if importance.is_meta:
        return torch.arange(kept)
    return importance.cpu().topk(kept).indices.sort().values


def _of_heads(index: Tensor, width: int) -> Tensor:
    return (index[:, None] * width + torch.arange(width)).flatten()


def _with_widths(config: ModelConfig, widths: list[int]) -> ModelConfig:
    if len(set(widths)) == 1:
        return config.model_copy(update={"intermediate_size": widths[0], "mlp_widths": []})
    return config.model_copy(update={"intermediate_size": config.mlp_width, "mlp_widths": widths})


def _with_kv_heads(config: ModelConfig, counts: list[int]) -> ModelConfig:
    group = config.num_attention_heads // config.kv_heads
    if len(set(counts)) == 1:
        new = {
            "num_attention_heads": counts[0] * group,
            "num_key_value_heads": counts[0],
            "kv_head_counts": [],
        }
    else:
        new = {"kv_head_counts": counts}
    return config.model_copy(update={"head_dim": config.head_width, **new})
