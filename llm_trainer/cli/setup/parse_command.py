"""What every command does first: parse its settings, explain them if asked, check that they can be had."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llm_trainer.config import InferenceConfig, UsageError
from llm_trainer.config.describe import explain
from llm_trainer.config.environment import apply_dotenv
from llm_trainer.config.parse.command import CommandSpec, LoadedRun
from llm_trainer.config.parse.loader import load_run
from llm_trainer.config.parse.validation import check_implemented

if TYPE_CHECKING:
    from rich.console import Console


def parse_command(spec: CommandSpec, argv: Sequence[str]) -> LoadedRun | None:
    """Parse the command line of a command.

    Args:
        spec: The command.
        argv: Its arguments.

    Returns:
        The settings; None if `--explain` was given and has been printed.

    Raises:
        UsageError: For anything that is wrong with the settings.
    """
    loaded = load_run(spec, argv)
    if loaded.explain:
        print(explain(loaded))
        return None
    check_implemented(loaded.config, spec.names(), loaded.options)
    apply_dotenv()
    return loaded


def named_model(inference: InferenceConfig) -> str:
    """The model that the settings name.

    Args:
        inference: The settings of inference.

    Raises:
        UsageError: If there is none.
    """
    if inference.model is None:
        raise UsageError(
            "no model is named; give --model with a run folder, a checkpoint or the name of a model on the "
            "hub"
        )
    return inference.model


def new_console(*, is_quiet: bool = False) -> Console:
    """The console of a command, on stdout. Progress bars appear on a terminal only.

    Args:
        is_quiet: Print nothing; for ranks other than the main one.
    """
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True, quiet=is_quiet)


def print_line(console: Console, line: str) -> None:
    """Print one line as it is, without markup and line breaks."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)
