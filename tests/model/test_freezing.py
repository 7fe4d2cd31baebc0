"""Parts are selected by ranges and globs, frozen, trained again and counted."""

from __future__ import annotations

import pytest
from model_shapes import small_config
from torch import nn

from llm_trainer.config import UsageError
from llm_trainer.model.module_names import matching_parts, named_parts, trainable_counts
from llm_trainer.model.transformer import Transformer


def frozen_parts(model: nn.Module) -> list[str]:
    """The parts of which no parameter is trained."""
    parts = named_parts(model).items()
    return [name for name, part in parts if not any(one.requires_grad for one in part.parameters())]


def model_of(**changes: object) -> Transformer:
    return Transformer(small_config(num_hidden_layers=4, **changes))


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("attn.2", ["attn.2"]),
        ("attn.0-2", ["attn.0", "attn.1", "attn.2"]),
        ("ln_?.0", ["ln_1.0", "ln_2.0"]),
        (["mlp.3", "w*"], ["wte", "wpe", "mlp.3"]),
    ],
)
def test_names_ranges_and_globs_match_parts(wanted: str | list[str], found: list[str]) -> None:
    assert matching_parts(model_of(), wanted) == found


@pytest.mark.parametrize("wanted", ["attn.2-4", "attn.3-1", "mlp*x", "atn.0", "attn.0-99999999999"])
def test_a_pattern_without_a_match_is_an_error_that_lists_the_parts(wanted: str) -> None:
    with pytest.raises(UsageError, match=r"its modules are .*attn\.0 … attn\.3"):
        matching_parts(model_of(), wanted)


def test_parts_are_frozen_and_trained_again() -> None:
    model = model_of(tie_word_embeddings=False)
    assert model.freeze_layer(["attn.0-1", "wte"]) == ["wte", "attn.0", "attn.1"]
    assert frozen_parts(model) == ["wte", "attn.0", "attn.1"]
    counts = trainable_counts(model)
    assert counts["attn.0"].trainable == 0 < counts["attn.0"].total
    assert counts["attn.2"].trainable == counts["attn.2"].total
    model.unfreeze_layer("attn.*")
    assert frozen_parts(model) == ["wte"]


def test_freezing_a_tied_part_freezes_and_reports_both() -> None:
    model = model_of()
    assert model.freeze_layer("lm_head") == ["wte", "lm_head"]
    assert frozen_parts(model) == ["wte", "lm_head"]
