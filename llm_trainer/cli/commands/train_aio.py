"""`train_aio.py`: everything in one command, data included.

Where no data is prepared, the built-in corpus is: splits into data/processed, shards into data/ready. Without
an output_dir the result is also found as models/final/.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.cli.commands.prepare_domains import domains_to_train_on
from llm_trainer.cli.commands.train import Assembled, assemble, run_training
from llm_trainer.cli.scripts import TRAIN_ALL_IN_ONE
from llm_trainer.cli.setup.build_dataset import refuse_idle
from llm_trainer.cli.setup.parse_command import new_console, open_door
from llm_trainer.config import DataConfig
from llm_trainer.config.environment import launch_environment
from llm_trainer.config.parse.loader import LoadedRun
from llm_trainer.run_dir import FINAL_MODEL

if TYPE_CHECKING:
    from rich.console import Console

PROCESSED, READY = Path("data/processed"), Path("data/ready")
PUBLISHED = Path("models/final")


def run(argv: list[str]) -> int:
    """Prepare if need be, train, publish; returns the exit status."""
    loaded = open_door(TRAIN_ALL_IN_ONE, argv)
    if loaded is None:
        return 0
    from llm_trainer.cli.setup.resume_config import resume_source
    from llm_trainer.distributed.process_group import joined

    with joined(launch_environment(), loaded.config.training) as ranks:
        console = new_console(is_quiet=not ranks.is_main)
        refuse_idle(loaded)
        source = resume_source(loaded.config.training, ranks)
        parts = ranks.main_first(lambda: _assembled(loaded, console, source))
        status = run_training(parts, console, " ".join(["train_aio.py", *argv]), ranks)
    final = Path(loaded.config.training.output_dir) / FINAL_MODEL
    if status == 0 and ranks.is_main and not loaded.config.training.is_said("output_dir") and final.is_dir():
        publish_final(final)
        console.print(f"published  {PUBLISHED}")
    return status


def _assembled(loaded: LoadedRun, console: Console, source: Path | None) -> Assembled:
    """Data, prepared if need be, and the model."""
    training, data = loaded.config.training, loaded.config.data
    is_resumed = training.resume_from is not None
    if training.use_domain_specific_data and not is_resumed:
        training.domain_data_dir = str(domains_to_train_on(training.domain_data_dir, data, console))
    elif not is_resumed and not any(
        data.is_said(name) for name in ("data_dir", "dataset", "input", "dataset_name")
    ):
        make_ready(data, console)
    return assemble(loaded, console, (str(READY),), source)


def make_ready(data: DataConfig, console: Console) -> None:
    """See to it that data/ready holds shards: from data/processed, else from the built-in corpus."""
    from llm_trainer.cli.commands.export_splits import publish_shards
    from llm_trainer.data.pipeline.pipeline import prepare

    if (READY / "metadata.json").is_file():
        return
    if not (PROCESSED / "metadata.json").is_file():
        console.print(f"no data is prepared: preparing the built-in corpus into {PROCESSED} and {READY}")
        settings = data.model_copy()
        settings.input, settings.val_ratio, settings.test_ratio = "builtin", 0.1, 0.1
        for line in prepare(settings, PROCESSED, console=console, with_texts=True).lines():
            console.print(line, markup=False)
    publish_shards(PROCESSED, READY)


def publish_final(final: Path) -> None:
    """Make models/final the final model: a link, or a copy where links cannot be made."""
    if PUBLISHED.is_symlink():
        PUBLISHED.unlink()
    elif PUBLISHED.is_dir():
        shutil.rmtree(PUBLISHED)
    PUBLISHED.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        PUBLISHED.symlink_to(
            Path("..") / final if not final.is_absolute() else final, target_is_directory=True
        )
        return
    shutil.copytree(final, PUBLISHED)
