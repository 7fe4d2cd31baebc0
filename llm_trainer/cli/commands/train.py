"""`llm-trainer train` and the manuals' training scripts: settings, data, model, trainer, in that order, and
what came of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.cli.runtime_env import keep_freed_memory
from llm_trainer.cli.scripts import TRAIN, TRAIN_FRAMEWORK, TRAIN_FROM_FILE, TRAIN_ORCHESTRATOR
from llm_trainer.cli.setup.parse_command import new_console, open_door
from llm_trainer.config import RunConfig
from llm_trainer.config.environment import launch_environment, use_compile_cache
from llm_trainer.config.parse.loader import Door, LoadedRun

if TYPE_CHECKING:
    from rich.console import Console

    from llm_trainer.cli.setup.build_dataset import RunData
    from llm_trainer.distributed.process_group import Ranks
    from llm_trainer.model.transformer import Transformer

PREPARED_FOLDERS = ("data/ready", "data/processed", "processed_data")


def run(argv: list[str]) -> int:
    """`llm-trainer train`."""
    return train(TRAIN, argv, PREPARED_FOLDERS)


def framework(argv: list[str]) -> int:
    """`train.py`."""
    return train(TRAIN_FRAMEWORK, argv, ("processed_data",))


def trainer(argv: list[str]) -> int:
    """`scripts/train.py`."""
    return train(TRAIN_FROM_FILE, argv, ("data/processed",))


def orchestrator(argv: list[str]) -> int:
    """`train_refactored.py`."""
    return train(TRAIN_ORCHESTRATOR, argv)


def train(door: Door, argv: Sequence[str], fallbacks: Sequence[str] = ()) -> int:
    """Train as one door means it and return the exit status."""
    loaded = open_door(door, argv)
    if loaded is None:
        return 0
    from llm_trainer.cli.setup.build_dataset import refuse_idle
    from llm_trainer.cli.setup.resume_config import resume_source
    from llm_trainer.distributed.process_group import joined

    with joined(launch_environment(), loaded.config.training) as ranks:
        console = new_console(is_quiet=not ranks.is_main)
        refuse_idle(loaded)
        source = resume_source(loaded.config.training, ranks)
        parts = ranks.main_first(lambda: assemble(loaded, console, fallbacks, source))
        return run_training(parts, console, " ".join([door.name, *argv]), ranks)


@dataclass
class Assembled:
    """All that a trainer needs, with settings resolved."""

    config: RunConfig
    model: Transformer
    data: RunData
    source: Path | None = None


def assemble(
    loaded: LoadedRun, console: Console, fallbacks: Sequence[str] = (), source: Path | None = None
) -> Assembled:
    """Open the data, build or load the model, and write into the settings what was resolved on the way.

    `source`: the verified checkpoint that the run goes on from.
    """
    from llm_trainer.cli.setup.build_dataset import find_data, use_domains
    from llm_trainer.cli.setup.build_model import (
        corpora_of,
        is_pretrained,
        new_model,
        pretrained_model,
        refuse_adapter_over_nothing,
        refuse_other_tokens,
        refuse_untold_domains,
        shape_for,
        transferred,
        use_tokenizer_of,
    )
    from llm_trainer.cli.setup.resume_config import resumed_config
    from llm_trainer.data.prepared_dataset import require_vocabulary

    refuse_adapter_over_nothing(loaded.config.training)
    config = loaded.config if source is None else resumed_config(loaded, source, console)
    if loaded.is_resuming:
        loaded.check(None if source is None else config)
    if is_pretrained(config.training.init_from) and source is None:
        use_tokenizer_of(config.training.init_from, config.data)
    use_domains(config.training, config.data)
    data = find_data(config.data, console, fallbacks)
    config.data.data_dir = str(data.folder)
    if source is not None:
        model = new_model(config.model, config.training.seed)  # the checkpoint's weights replace these
    elif is_pretrained(config.training.init_from):
        model = pretrained_model(
            config.training.init_from, config.model, corpora_of(data.prepared), config.training.adapter_from
        )
        refuse_other_tokens(config.training.init_from, data.prepared.tokenizer)
    else:
        model = new_model(shape_for(config.model, data.prepared, loaded.origins), config.training.seed)
    if config.training.transfer_from is not None and source is None:
        for line in transferred(model, config.training.transfer_from, config.training.transfer_parts):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    config.model = model.config
    refuse_untold_domains(config.model, config.training, corpora_of(data.prepared))
    require_vocabulary(data.prepared.train, model.config.vocab_size)
    return Assembled(config, model, data, source)


def run_training(parts: Assembled, console: Console, command: str, ranks: Ranks) -> int:
    """Train, tell about it, leave a report; returns the exit status."""
    from llm_trainer.cli.setup.run_summary import record_facts, tell_end, tell_start
    from llm_trainer.cli.setup.scaling_schedule import orchestrator_for, tell_schedule
    from llm_trainer.training.trainer import Trainer

    keep_freed_memory()
    prepared = parts.data.prepared
    orchestrator = orchestrator_for(parts.config.training)
    trainer = Trainer(
        parts.model,
        parts.config,
        prepared.train,
        prepared.validation,
        tokenizer=prepared.tokenizer,
        console=console,
        callbacks=[orchestrator] if orchestrator else [],
        cache_dir=use_compile_cache(),
        ranks=ranks,
        verified=parts.source,
    )
    tell_start(trainer, parts.data.folder, console)
    if orchestrator is not None:
        tell_schedule(orchestrator, trainer, console)
    result = trainer.train()
    if not ranks.is_main:
        return result.exit_status
    if result.ended_by != "evaluated":
        record_facts(trainer, parts.data, result, command)
    tell_end(trainer, result, console)
    return result.exit_status
