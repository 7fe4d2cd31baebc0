"""Going on with an interrupted run: its own saved settings, with what the user says now laid over them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.config import RunConfig, TrainingConfig
from llm_trainer.config.parse.loader import LoadedRun
from llm_trainer.run_dir import read_run_config

if TYPE_CHECKING:
    from rich.console import Console

    from llm_trainer.distributed.process_group import Ranks


def resume_source(training: TrainingConfig, ranks: Ranks) -> Path | None:
    """The verified checkpoint folder that the settings mean, None for a run that begins. A collective call.
    Raises CheckpointError.

    `resume_from: auto` is the newest checkpoint of output_dir, if there is one; nanoGPT's `init_from: resume` demands one.
    """
    if training.remote_dir is not None or any(
        "://" in str(said) for said in (training.output_dir, training.resume_from)
    ):
        from llm_trainer.training.checkpoint.remote import fetch_resumed

        ranks.main_first(lambda: fetch_resumed(training, lambda line: print(line, file=sys.stderr)))
    spec = training.resume_from
    if spec is None and training.init_from == "resume":
        spec = training.output_dir
    if spec is None:
        return None
    from llm_trainer.training.checkpoint.distributed_resume import found_together
    from llm_trainer.training.checkpoint.resume import resume_folder

    return found_together(ranks, lambda check: resume_folder(spec, Path(training.output_dir), check=check))


def resumed_config(loaded: LoadedRun, source: Path, console: Console) -> RunConfig:
    """The settings of the run in `source` with what was said now laid over them."""
    base = read_run_config(source)
    config = loaded.over(base)
    for name in ("vocab_size", "max_position_embeddings"):  # a preset suggests them; the run has settled them
        if loaded.origins.get(f"model.{name}", "").startswith("preset"):
            setattr(config.model, name, getattr(base.model, name))
    if not loaded.config.data.is_said("data_dir") and any(
        loaded.config.data.is_said(name) for name in ("input", "dataset_name", "dataset")
    ):
        config.data.data_dir = None
    config.training.resume_from = str(source)
    if config.training.output_dir != base.training.output_dir and not loaded.config.training.is_said(
        "remote_dir"
    ):
        config.training.remote_dir = None  # another run; the copy is the first one's
    if not loaded.config.training.is_said("output_dir"):
        config.training.output_dir = str(source.parent)
    return config
