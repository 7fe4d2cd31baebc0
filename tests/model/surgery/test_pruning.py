"""Pruned blocks keep the most important units and heads, may be of unequal width, and are saved, loaded and
cached.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_shapes import small_config

from llm_trainer.config import UsageError
from llm_trainer.config.param_count import parameter_count
from llm_trainer.model.hf.checkpoint import load_pretrained, save_pretrained
from llm_trainer.model.kv_cache import KVCache
from llm_trainer.model.surgery.depth import stack_layers
from llm_trainer.model.surgery.model_state import ModelState
from llm_trainer.model.surgery.pruning import prune_heads, prune_mlp
from llm_trainer.model.surgery.width import widen_mlp
from llm_trainer.model.transformer import Transformer

IDS = torch.arange(20).view(2, 10) * 7 % 61


def state_of(**shape: object) -> ModelState:
    return ModelState.from_model(Transformer(small_config(**shape), torch.Generator().manual_seed(0)))


def logits(of: ModelState) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = of.to_model().eval()(IDS)
    return result


@pytest.mark.parametrize(
    "shape", [{}, {"model_type": "llama", "num_key_value_heads": 2}], ids=["gpt2", "grouped"]
)
def test_units_and_heads_without_effect_are_removed_first(shape: dict[str, object]) -> None:
    before = state_of(**shape)
    width, units = before.config.head_width, before.config.mlp_width
    group = before.config.num_attention_heads // before.config.kv_heads
    before.weights["blocks.0.mlp.down_proj.weight"][:, : units // 4] = 0
    before.weights["blocks.1.attn.o_proj.weight"][:, width * group : 2 * width * group] = 0
    after = prune_heads(prune_mlp(before, "mlp.0", 0.25), "attn.1", 1 / before.config.kv_heads)
    assert after.config.mlp_hidden_sizes == [units * 3 // 4, units]
    assert after.config.kv_heads_per_layer == [before.config.kv_heads, before.config.kv_heads - 1]
    torch.testing.assert_close(logits(after), logits(before), atol=1e-6, rtol=1e-5)
    assert after.num_parameters == parameter_count(after.config) < before.num_parameters


def test_pruning_every_block_equally_gives_an_ordinary_shape() -> None:
    after = prune_heads(prune_mlp(state_of(), "mlp.*", 0.5), "attn.0-1", 0.5)
    assert (after.config.mlp_hidden_sizes, after.config.kv_heads_per_layer) == ([], [])
    assert (after.config.mlp_width, after.config.num_attention_heads, after.config.head_width) == (64, 2, 8)


def test_a_model_of_unequal_blocks_is_saved_loaded_and_cached(tmp_path: Path) -> None:
    uneven = prune_heads(prune_mlp(state_of(), "mlp.0", 0.3), "attn.1", 0.5)
    save_pretrained(uneven.to_model(), tmp_path)
    loaded = load_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS), logits(uneven))
        cache = KVCache(loaded.config, batch_size=2, max_length=12)
        parts = [
            loaded(IDS[:, :6], cache=cache),
            loaded(IDS[:, 6:9], cache=cache),
            loaded(IDS[:, 9:], cache=cache),
        ]
        torch.testing.assert_close(torch.cat(parts, dim=1), logits(uneven))


def test_a_model_of_unequal_blocks_can_be_stacked_and_widened() -> None:
    uneven = prune_mlp(state_of(), "mlp.0", 0.3)
    stacked = stack_layers(uneven, [0, 0, 1])
    assert stacked.config.mlp_hidden_sizes == [90, 90, 128]
    even = widen_mlp(stacked, 128)
    assert even.config.mlp_hidden_sizes == []
    torch.testing.assert_close(logits(even), logits(stacked), atol=1e-5, rtol=1e-5)


def test_parts_that_cannot_be_pruned_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="no heads"):
        prune_heads(state_of(), "mlp.0", 0.5)
    with pytest.raises(UsageError, match="no module 'attn"):
        prune_heads(state_of(), "attn.7", 0.5)
    with pytest.raises(UsageError, match="leaves nothing"):
        prune_heads(state_of(num_attention_heads=1), "attn.0", 0.5)
