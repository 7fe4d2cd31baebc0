"""The settings of a resumed run: those that it saved, with what the user sets now on top."""

from __future__ import annotations

from pathlib import Path

from llm_trainer.config import RunConfig
from llm_trainer.config.parse.command import LoadedRun
from llm_trainer.config.saved_run import read_run_config

_NAMES_OF_DATA = ("input", "dataset_name", "dataset")


def merge_saved_config(loaded: LoadedRun, checkpoint: Path) -> RunConfig:
    """Merge what was set on the command line over the settings of the run that is resumed.

    Args:
        loaded: The command line.
        checkpoint: The checkpoint folder to resume from.

    Returns:
        All settings.
    """
    saved = read_run_config(checkpoint)
    merged = loaded.merged_over(saved)
    given = loaded.config
    data = merged.data
    if not given.data.is_set("data_dir") and any(given.data.is_set(name) for name in _NAMES_OF_DATA):
        data = data.model_copy(update={"data_dir": None})
    training: dict[str, object] = {"resume_from": str(checkpoint)}
    if merged.training.output_dir != saved.training.output_dir and not given.training.is_set("remote_dir"):
        training["remote_dir"] = None  # this is another run; the remote copy belongs to the first one
    if not given.training.is_set("output_dir"):
        training["output_dir"] = str(checkpoint.parent)
    return merged.model_copy(update={"data": data, "training": merged.training.model_copy(update=training)})
