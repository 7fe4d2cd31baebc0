"""A DeepSpeed file is one more source of settings: it sets what no other source sets, and may not contradict
the others.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_trainer.config import RunConfig, TrainingConfig, UsageError
from llm_trainer.config.resolve.deepspeed import deepspeed_file, merge_deepspeed, zero_settings

THE_MANUALS = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.01}},
    "fp16": {"enabled": True},
    "zero_optimization": {"stage": 2},
}


def merged(folder: Path, content: dict[str, object], **given: object) -> TrainingConfig:
    path = folder / "ds.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    training = TrainingConfig(use_deepspeed=True, deepspeed_config=str(path), **given)
    file = deepspeed_file(training)
    assert file is not None
    return merge_deepspeed(RunConfig(training=training), file).training


def test_the_file_sets_what_no_other_source_sets(tmp_path: Path) -> None:
    training = merged(tmp_path, THE_MANUALS, max_steps=5)
    assert (training.batch_size, training.micro_batch_size, training.gradient_accumulation_steps) == (
        64,
        4,
        4,
    )
    assert (training.learning_rate, training.weight_decay, training.precision, training.zero_stage) == (
        1e-4,
        0.01,
        "fp16",
        2,
    )
    assert training.max_steps == 5
    assert training.adam_beta2 == TrainingConfig().adam_beta2


@pytest.mark.parametrize(
    ("given", "both"),
    [
        ({"learning_rate": 3e-4}, ("lr is 0.0001", "learning_rate is 0.0003")),
        ({"zero_stage": 3}, ("stage is 2", "zero_stage is 3")),
        ({"precision": "bf16"}, ("fp16.enabled is fp16", "precision is bf16")),
        ({"batch_size": 8}, ("train_micro_batch_size_per_gpu is 4", "batch_size is 8")),
        ({"batch_size": 32, "micro_batch_size": 4}, ("train_batch_size is 64", "batch_size is 32")),
        ({"optimizer": "muon"}, ("optimizer.type is adamw", "optimizer is muon")),
    ],
)
def test_a_contradiction_names_both_values(
    tmp_path: Path, given: dict[str, object], both: tuple[str, str]
) -> None:
    with pytest.raises(UsageError) as error:
        merged(tmp_path, THE_MANUALS, **given)
    for part in both:
        assert part in str(error.value)


def test_equal_values_are_accepted(tmp_path: Path) -> None:
    training = merged(tmp_path, THE_MANUALS, batch_size=4, learning_rate=1e-4)
    assert (training.batch_size, training.micro_batch_size) == (64, 4)


def test_auto_leaves_a_value_to_the_settings(tmp_path: Path) -> None:
    content: dict[str, object] = {
        "train_batch_size": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    }
    training = merged(tmp_path, content, learning_rate=2e-3)
    assert training.learning_rate == 2e-3
    assert training.batch_size is None


def test_buffer_sizes_are_passed_on(tmp_path: Path) -> None:
    training = merged(tmp_path, {"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000}})
    assert zero_settings(training, deepspeed_file(training)) == {"stage": 3, "reduce_bucket_size": 1000}


@pytest.mark.parametrize(
    "content", [{"zero_optimization": {"stage": 0}}, {"scheduler": {"type": "WarmupLR"}}]
)
def test_keys_that_are_not_supported_are_errors(tmp_path: Path, content: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"ds\.json"):
        merged(tmp_path, content)
