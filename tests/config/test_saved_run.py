"""The settings that are saved with a checkpoint are read back, also those of an earlier version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_trainer.config import CheckpointError, ModelConfig, RunConfig
from llm_trainer.config.saved_run import RENAMED_SETTINGS, read_run_config
from llm_trainer.config.schema.run_config import section_class


def test_settings_of_one_start_are_not_read_back_from_run_json(tmp_path: Path) -> None:
    config = RunConfig(training={"lr_on_resume": "extend", "resume_from": "x", "learning_rate": 0.5})
    (tmp_path / "run.json").write_text(
        json.dumps({**config.model_dump(mode="json"), "versions": {"torch": "2"}}), encoding="utf-8"
    )
    stored = read_run_config(tmp_path)
    assert (stored.training.lr_on_resume, stored.training.resume_from, stored.training.learning_rate) == (
        None,
        None,
        0.5,
    )


def test_a_run_json_of_an_earlier_version_is_read_by_its_old_keys(tmp_path: Path) -> None:
    saved = {
        "model": {
            "num_hidden_layers": 2,
            "positions": "rope",
            "gradient_checkpointing": True,
            "checkpoint_every": 2,
            "checkpoint_keep": ["attention", "products"],
            "lora": {"a": {"ranks": {"attn.0": 2}}},
            "lora_in_use": ["a"],
            "mlp_widths": [8, 16],
            "kv_head_counts": [12, 6],
        },
        "training": {
            "horizon": "extend",
            "accumulation_counts_all_ranks": True,
            "learning_rate_factors": {"wte": 0.5},
            "layer_rate_decay": 0.9,
            "spike_distance": 7,
            "spike_rate_factor": 0.25,
            "memory_target": 0.5,
            "memory_warning": 0.6,
            "memory_emergency": 0.7,
            "watch_seconds": 3.0,
            "recent_save_interval": "2 epochs",
            "recent_save_limit": 4,
            "transfer_parts": ["attn.*"],
        },
        "data": {
            "max_symbol_share": 0.1,
            "max_repeated_share": 0.2,
            "one_document_a_line": True,
            "keep_stages": False,
        },
        "generation": {"slide": True},
        "versions": {"torch": "2"},
    }
    (tmp_path / "run.json").write_text(json.dumps(saved), encoding="utf-8")
    config = read_run_config(tmp_path)
    assert (config.model.position_embedding, config.model.activation_checkpoint_every) == ("rope", 2)
    assert config.model.activation_checkpoint_policy == ["attention", "matmul"]
    assert config.model.active_adapters == ["a"]
    assert (config.model.mlp_hidden_sizes, config.model.kv_heads_per_layer) == ([8, 16], [12, 6])
    assert config.training.lr_on_resume is None
    assert config.training.global_grad_accumulation
    assert (config.training.lr_multipliers, config.training.layerwise_lr_decay) == ({"wte": 0.5}, 0.9)
    assert (config.training.spike_rollback_steps, config.training.spike_lr_factor) == (7, 0.25)
    assert config.training.memory_target_fraction == 0.5
    assert config.training.memory_warning_fraction == 0.6
    assert config.training.memory_emergency_fraction == 0.7
    assert config.training.memory_poll_seconds == 3.0
    assert str(config.training.ephemeral_save_interval) == "2 epochs"
    assert (config.training.ephemeral_save_limit, config.training.transfer_modules) == (4, ["attn.*"])
    assert (config.data.max_symbol_fraction, config.data.max_repeated_fraction) == (0.1, 0.2)
    assert config.data.one_document_per_line
    assert not config.data.cache_stages
    assert config.generation.sliding_context


def test_every_renamed_setting_leads_to_a_field_and_is_not_a_name_of_today() -> None:
    for section, names in RENAMED_SETTINGS.items():
        for old, new in names.items():
            assert new in section_class(section).model_fields
            assert old not in section_class(section).names()


def test_a_config_json_of_an_earlier_version_is_read_by_its_old_keys() -> None:
    from llm_trainer.model.hf.config import config_from_huggingface, config_to_huggingface

    config = ModelConfig(position_embedding="none", kv_heads_per_layer=[12] * 12, mlp_hidden_sizes=[8] * 12)
    content = config_to_huggingface(config)
    for new, old in (
        ("position_embedding", "positions"),
        ("kv_heads_per_layer", "kv_head_counts"),
        ("mlp_hidden_sizes", "mlp_widths"),
    ):
        content[old] = content.pop(new)
    read = config_from_huggingface(content)
    assert read.position_embedding == "none"
    assert (read.kv_heads_per_layer, read.mlp_hidden_sizes) == ([12] * 12, [8] * 12)


def test_a_run_json_without_settings_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="holds no settings"):
        read_run_config(tmp_path)
