"""`train_aio.py`: everything in one command, data included.

Where no data is prepared, the built-in corpus is: splits into data/processed, shards into data/ready. Without
an output_dir the result is also published as models/final/.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.cli.commands.prepare_domains import domains_to_train_on
from llm_trainer.cli.commands.train import train_on_ranks
from llm_trainer.cli.setup.parse_command import parse_command
from llm_trainer.cli.specs import TRAIN_ALL_IN_ONE
from llm_trainer.config import DataConfig, RunConfig
from llm_trainer.run_dir import FINAL_MODEL

if TYPE_CHECKING:
    from rich.console import Console

PROCESSED, READY = Path("data/processed"), Path("data/ready")
PUBLISHED = Path("models/final")


def run(argv: list[str]) -> int:
    """Prepare data if need be, train, publish; returns the exit code."""
    loaded = parse_command(TRAIN_ALL_IN_ONE, argv)
    if loaded is None:
        return 0
    final = Path(loaded.config.training.output_dir) / FINAL_MODEL
    has_own_folder = loaded.config.training.is_set("output_dir")

    def publish(console: Console) -> None:
        if not has_own_folder and final.is_dir():
            publish_final(final)
            console.print(f"published  {PUBLISHED}")

    return train_on_ranks(
        loaded, " ".join(["train_aio.py", *argv]), (str(READY),), prepare=_with_data, after=publish
    )


def _with_data(config: RunConfig, console: Console) -> RunConfig:
    """Prepare the domains, or data/ready, where the settings name no data."""
    training, data = config.training, config.data
    if training.use_domain_specific_data:
        folder = str(domains_to_train_on(training.domain_data_dir, data, console))
        return config.model_copy(update={"training": training.model_copy(update={"domain_data_dir": folder})})
    if not any(data.is_set(name) for name in ("data_dir", "dataset", "input", "dataset_name")):
        make_ready(data, console)
    return config


def make_ready(data: DataConfig, console: Console) -> None:
    """Make sure that data/ready holds shards: from data/processed, else from the built-in corpus.

    Args:
        data: How to prepare them.
        console: Where to print.
    """
    from llm_trainer.cli.setup.export_splits import publish_shards
    from llm_trainer.data.pipeline.pipeline import prepare_dataset

    if (READY / "metadata.json").is_file():
        return
    if not (PROCESSED / "metadata.json").is_file():
        console.print(f"no data is prepared: preparing the built-in corpus into {PROCESSED} and {READY}")
        settings = data.model_copy(update={"input": "builtin", "val_ratio": 0.1, "test_ratio": 0.1})
        for line in prepare_dataset(settings, PROCESSED, console=console, with_texts=True).lines():
            console.print(line, markup=False)
    publish_shards(PROCESSED, READY)


def publish_final(final: Path) -> None:
    """Make models/final the final model: a link, or a copy where links cannot be made.

    Args:
        final: The folder of the final model.
    """
    if PUBLISHED.is_symlink():
        PUBLISHED.unlink()
    elif PUBLISHED.is_dir():
        shutil.rmtree(PUBLISHED)
    PUBLISHED.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        target = final if final.is_absolute() else Path("..") / final
        PUBLISHED.symlink_to(target, target_is_directory=True)
        return
    shutil.copytree(final, PUBLISHED)
