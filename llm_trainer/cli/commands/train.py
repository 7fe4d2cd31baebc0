"""`llm-trainer train` and the manuals' training scripts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llm_trainer.cli.runtime_env import keep_freed_memory
from llm_trainer.cli.setup.parse_command import new_console, parse_command
from llm_trainer.cli.specs import TRAIN, TRAIN_FRAMEWORK, TRAIN_FROM_FILE, TRAIN_ORCHESTRATOR
from llm_trainer.config.environment import compile_cache_dir, launch_environment

if TYPE_CHECKING:
    from rich.console import Console

    from llm_trainer.cli.setup.build_training import TrainingSetup
    from llm_trainer.config import RunConfig
    from llm_trainer.config.parse.command import CommandSpec, LoadedRun

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


def train(spec: CommandSpec, argv: Sequence[str], fallbacks: Sequence[str] = ()) -> int:
    """Train a model.

    Args:
        spec: The command or script.
        argv: Its arguments.
        fallbacks: Prepared folders to use where no data is named.

    Returns:
        The exit code.
    """
    loaded = parse_command(spec, argv)
    if loaded is None:
        return 0
    return train_on_ranks(loaded, " ".join([spec.name, *argv]), fallbacks)


def train_on_ranks(
    loaded: LoadedRun,
    command: str,
    fallbacks: Sequence[str] = (),
    prepare: Callable[[RunConfig, Console], RunConfig] | None = None,
    after: Callable[[Console], None] | None = None,
) -> int:
    """Join the ranks, build the training, train.

    Args:
        loaded: The command line.
        command: The command as it was typed, for the report.
        fallbacks: Prepared folders to use where no data is named.
        prepare: Prepares data for a new run, and returns the settings that name them.
        after: Called on the main rank after a run that ended well.

    Returns:
        The exit code.
    """
    from llm_trainer.cli.setup.build_training import build_training
    from llm_trainer.distributed.process_group import init_process_group

    with init_process_group(launch_environment(), loaded.config.training) as process_group:
        console = new_console(is_quiet=not process_group.is_main)
        setup = build_training(
            loaded,
            console,
            process_group,
            fallbacks,
            None if prepare is None else lambda config: prepare(config, console),
        )
        code = run_training(setup, console, command)
        if code == 0 and after is not None and process_group.is_main:
            after(console)
    return code


def run_training(setup: TrainingSetup, console: Console, command: str) -> int:
    """Train, print what happens, leave a report.

    Args:
        setup: The parts of the training.
        console: Where to print.
        command: The command as it was typed, for the report.

    Returns:
        The exit code.
    """
    from llm_trainer.cli.setup.run_summary import print_end, print_start, record_metadata
    from llm_trainer.cli.setup.scaling_schedule import build_orchestrator, print_schedule
    from llm_trainer.training.run_lock import RunLock
    from llm_trainer.training.trainer import Trainer

    keep_freed_memory()
    prepared = setup.data.prepared
    orchestrator = build_orchestrator(setup.run.training)
    trainer = Trainer(
        setup.model,
        setup.run,
        prepared.train,
        prepared.validation,
        tokenizer=prepared.tokenizer,
        console=console,
        callbacks=[orchestrator] if orchestrator else [],
        cache_dir=compile_cache_dir(),
    )
    print_start(trainer.run, setup.data.folder, console)
    if orchestrator is not None:
        print_schedule(orchestrator, trainer.run, console)
    result = trainer.train()
    if trainer.run.process_group.is_main:
        if result.ended_by != "evaluated":
            with RunLock(trainer.run.run_dir):
                record_metadata(trainer.run, setup.data, result, command)
        print_end(trainer.run, result, console)
    return result.exit_code
