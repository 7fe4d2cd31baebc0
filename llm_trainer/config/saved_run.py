"""Reading the settings that were saved with a checkpoint, also those that an earlier version wrote under
other names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llm_trainer.config.schema.run_config import RunConfig
from llm_trainer.errors import CheckpointError
from llm_trainer.run_dir import RUN_FILE, read_json

# Section → the name under which an earlier version saved a setting → its name now. Names that are still
# aliases do not need an entry.
RENAMED_SETTINGS: Mapping[str, Mapping[str, str]] = {
    "model": {
        "positions": "position_embedding",
        "checkpoint_every": "activation_checkpoint_every",
        "checkpoint_keep": "activation_checkpoint_policy",
        "lora_in_use": "active_adapters",
        "mlp_widths": "mlp_hidden_sizes",
        "kv_head_counts": "kv_heads_per_layer",
    },
    "training": {
        "accumulation_counts_all_ranks": "global_grad_accumulation",
        "learning_rate_factors": "lr_multipliers",
        "layer_rate_decay": "layerwise_lr_decay",
        "spike_distance": "spike_rollback_steps",
        "spike_rate_factor": "spike_lr_factor",
        "memory_target": "memory_target_fraction",
        "memory_warning": "memory_warning_fraction",
        "memory_emergency": "memory_emergency_fraction",
        "watch_seconds": "memory_poll_seconds",
        "recent_save_interval": "ephemeral_save_interval",
        "recent_save_limit": "ephemeral_save_limit",
        "transfer_parts": "transfer_modules",
    },
    "data": {
        "max_symbol_share": "max_symbol_fraction",
        "max_repeated_share": "max_repeated_fraction",
        "one_document_a_line": "one_document_per_line",
        "keep_stages": "cache_stages",
    },
    "generation": {"slide": "sliding_context"},
}

# Settings of one start of a run, which a resumed run does not inherit.
_OF_ONE_START = ("resume_from", "lr_on_resume", "horizon")


def with_current_names(section: str, saved: Mapping[str, object]) -> dict[str, object]:
    """Translate the saved settings of a section to the names and values of this version.

    Args:
        section: The section, such as `model`.
        saved: Settings as run.json or config.json holds them.
    """
    renamed = RENAMED_SETTINGS.get(section, {})
    settings = {renamed.get(name, name): value for name, value in saved.items()}
    policy = settings.get("activation_checkpoint_policy")
    if isinstance(policy, list):
        settings["activation_checkpoint_policy"] = [
            "matmul" if kept == "products" else kept for kept in policy
        ]
    return settings


def read_run_config(folder: Path) -> RunConfig:
    """Read the settings in the `run.json` of a checkpoint or a run folder.

    Settings that belong to one start of the run (`resume_from`, `lr_on_resume`) are left out.

    Args:
        folder: The checkpoint or run folder.

    Raises:
        CheckpointError: The file is missing, damaged or holds no settings.
    """
    sections = {
        name: with_current_names(name, value) if isinstance(value, Mapping) else value
        for name, value in read_json(folder / RUN_FILE).items()
        if name in RunConfig.model_fields
    }
    if not sections:
        raise CheckpointError(
            f"{folder / RUN_FILE} holds no settings; --init_from={folder} starts a new run from its weights"
        )
    training = sections.get("training")
    if isinstance(training, Mapping):
        sections["training"] = {name: value for name, value in training.items() if name not in _OF_ONE_START}
    return RunConfig.model_validate(sections)
