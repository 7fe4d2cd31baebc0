"""A schedule is simulated before training: an impossible entry is reported with the entry that made it so."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llm_trainer.config import ModelConfig, UsageError
from llm_trainer.config.resolve.parallelism import ParallelPlan, check_shape
from llm_trainer.config.schema.scaling_schedule import Operation
from llm_trainer.model.hf.checkpoint import empty_model
from llm_trainer.model.surgery.model_state import ModelState
from llm_trainer.orchestration.dry_run import dry_run
from llm_trainer.orchestration.run_overrides import RunSettings

SHAPE = ModelConfig(
    vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=8
)
SETTINGS = RunSettings(1e-3, 8, 2, 10, None, 100)


def entry(name: str, value: object = None, **more: Any) -> Operation:
    return Operation(name=name, value=value, max_wait_iters=1, **more)


def test_the_last_stage_describes_the_final_model_and_settings() -> None:
    schedule = [
        entry("stack_layers", [0, 0, 1, 1]),
        entry("widen_mlp", 96),
        entry("widen_model", [32, 4]),
        entry("change_lr", 0.5),
    ]
    stages = dry_run(schedule, SHAPE, SETTINGS)
    assert len(stages) == 5
    assert str(stages[-1]).startswith(
        "4 layers × 32, 4 heads, MLPs of 96, vocabulary 100: 0.05 M parameters; learning rate 0.0005"
    )
    assert stages[0].parameters < stages[1].parameters < stages[2].parameters < stages[3].parameters


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            [entry("stack_layers", [0]), entry("freeze_layer", "attn.1")],
            r"entry 2.*no module 'attn.1'.*entry 1, stack_layers \[0\]",
        ),
        (
            [entry("widen_mlp", 96), entry("widen_mlp", 64)],
            "entry 2.*narrower.*96 units.*entry 1, widen_mlp 96",
        ),
        ([entry("widen_model", [24, 3])], "entry 1.*approximate"),
        ([entry("resize_vocabulary", 50)], "entry 1.*too small for the data, which use 90 ids"),
        (
            [entry("resize_vocabulary", {"size": 120, "remap_file": "none.json"})],
            "entry 1.*the vocabulary remapping file none.json does not exist",
        ),
        ([entry("enable_exit", 1)], "entry 1.*early exits are not implemented"),
        ([entry("change_eval_iters", 2)], "entry 1.*eval_iters is not set"),
        ([entry("freeze_layer", ["attn.*", "mlp.*", "ln_*", "w?e"])], "entry 1.*every module is frozen"),
        (
            [entry("prune_heads", ["attn.0", 0.5]), entry("widen_model", [32, 4])],
            "entry 2.*pruned.*entry 1, prune_heads",
        ),
        ([entry("set_layer_lora_rank", ["ln_1.0", 4])], "entry 1.*LoRA cannot be applied to ln_1.0"),
        ([entry("stack_layers", [1, 0], mode="identity")], "entry 1.*reorders"),
    ],
)
def test_an_impossible_entry_is_named_with_the_entry_that_made_it_impossible(
    schedule: list[Operation], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        dry_run(schedule, SHAPE, SETTINGS, data_vocab_size=90)


@pytest.mark.parametrize(
    "schedule",
    [
        [entry("set_attn_lora_rank", 0)],
        [entry("set_layer_lora_rank", ["attn.0", 0]), entry("set_layer_lora_rank", ["attn.1", 0])],
    ],
)
def test_the_last_adapters_over_a_frozen_base_cannot_be_removed(schedule: list[Operation]) -> None:
    shape = SHAPE.model_copy(update={"attn_lora_rank": 2, "lora_train_base": False})
    frozen = frozenset(ModelState.from_model(empty_model(SHAPE, "meta")).weights)
    with pytest.raises(UsageError, match=f"entry {len(schedule)}.*every module is frozen.*unfreeze_layer"):
        dry_run(schedule, shape, SETTINGS, frozen=frozen)
    dry_run([entry("unfreeze_layer", "mlp.*"), *schedule], shape, SETTINGS, frozen=frozen)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            [entry("widen_mlp", 96), entry("prune_heads", ["attn.1", 0.5])],
            "entry 2.*num_attention_heads 1 is not divisible by tensor_parallel 2",
        ),
        ([entry("widen_mlp", 97)], "entry 1.*intermediate_size 97 is not divisible by tensor_parallel 2"),
        (
            [entry("set_layer_lora_rank", ["mlp.0", 4])],
            "entry 1.*LoRA in blocks \\(mlp.0\\); use fsdp",
        ),
        ([entry("set_attn_lora_rank", 4)], "entry 1.*LoRA in blocks \\(attn.0\\)"),
    ],
)
def test_a_shape_that_tensor_parallel_cannot_shard_is_refused_before_training(
    schedule: list[Operation], message: str
) -> None:
    even = [entry("widen_mlp", 96), entry("set_embedding_lora_rank", 4), entry("prune_mlp", ["mlp.0", 0.5])]
    check = partial(check_shape, ParallelPlan(tensor_parallel=2))
    assert len(dry_run(even, SHAPE, SETTINGS, check_shape=check)) == 4
    with pytest.raises(UsageError, match=message):
        dry_run(schedule, SHAPE, SETTINGS, check_shape=check)


def test_nothing_is_allocated_for_a_large_model(tmp_path: Path) -> None:
    large = ModelConfig(
        hidden_size=8192, num_hidden_layers=16, num_attention_heads=64, intermediate_size=28672
    )  # 60 GB in fp32
    schedule = [
        entry("stack_layers", [*range(16), *range(16)]),
        entry("widen_mlp", 57344),
        entry("prune_mlp", ["mlp.*", 0.5]),
    ]
    assert dry_run(schedule, large, SETTINGS)[-1].config.num_hidden_layers == 32
