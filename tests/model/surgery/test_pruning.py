"""Pruned blocks keep what matters most, may be of unequal width, and are saved, loaded and cached as such."""

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
from llm_trainer.model.surgery.model_state import Form, build, form_of
from llm_trainer.model.surgery.pruning import prune_heads, prune_mlp
from llm_trainer.model.surgery.width import widen_mlp
from llm_trainer.model.transformer import Transformer

IDS = torch.arange(20).view(2, 10) * 7 % 61


def form(**shape: object) -> Form:
    return form_of(Transformer(small_config(**shape), torch.Generator().manual_seed(0)))


def logits(of: Form) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = build(of).eval()(IDS)
    return result


@pytest.mark.parametrize(
    "shape", [{}, {"model_type": "llama", "num_key_value_heads": 2}], ids=["gpt2", "grouped"]
)
def test_what_does_nothing_goes_first_and_is_not_missed(shape: dict[str, object]) -> None:
    before = form(**shape)
    width, units = before.config.head_width, before.config.mlp_width
    group = before.config.num_attention_heads // before.config.kv_heads
    before.weights["blocks.0.mlp.down_proj.weight"][:, : units // 4] = 0
    before.weights["blocks.1.attn.o_proj.weight"][:, width * group : 2 * width * group] = 0
    after = prune_heads(prune_mlp(before, "mlp.0", 0.25), "attn.1", 1 / before.config.kv_heads)
    assert after.config.mlp_widths == [units * 3 // 4, units]
    assert after.config.kv_head_counts == [before.config.kv_heads, before.config.kv_heads - 1]
    torch.testing.assert_close(logits(after), logits(before), atol=1e-6, rtol=1e-5)
    assert after.parameters == parameter_count(after.config) < before.parameters


def test_pruning_every_block_alike_leaves_an_ordinary_shape() -> None:
    after = prune_heads(prune_mlp(form(), "mlp.*", 0.5), "attn.0-1", 0.5)
    assert (after.config.mlp_widths, after.config.kv_head_counts) == ([], [])
    assert (after.config.mlp_width, after.config.num_attention_heads, after.config.head_width) == (64, 2, 8)


def test_an_uneven_model_is_saved_loaded_and_cached(tmp_path: Path) -> None:
    uneven = prune_heads(prune_mlp(form(), "mlp.0", 0.3), "attn.1", 0.5)
    save_pretrained(build(uneven), tmp_path)
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


def test_an_uneven_model_can_be_stacked_and_made_even_by_widening() -> None:
    uneven = prune_mlp(form(), "mlp.0", 0.3)
    stacked = stack_layers(uneven, [0, 0, 1])
    assert stacked.config.mlp_widths == [90, 90, 128]
    even = widen_mlp(stacked, 128)
    assert even.config.mlp_widths == []
    torch.testing.assert_close(logits(even), logits(stacked), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_pruned_is_named() -> None:
    with pytest.raises(UsageError, match="no heads"):
        prune_heads(form(), "mlp.0", 0.5)
    with pytest.raises(UsageError, match="no part 'attn"):
        prune_heads(form(), "attn.7", 0.5)
    with pytest.raises(UsageError, match="leaves nothing"):
        prune_heads(form(num_attention_heads=1), "attn.0", 0.5)
