"""What every door does first: read its settings, explain them if asked, refuse what is not built yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llm_trainer.config.environment import apply_dotenv
from llm_trainer.config.explain import explain
from llm_trainer.config.parse.loader import Door, LoadedRun, load_run
from llm_trainer.config.parse.not_implemented import refuse_owed

if TYPE_CHECKING:
    from rich.console import Console


def open_door(door: Door, argv: Sequence[str]) -> LoadedRun | None:
    """The settings of a command; None when `--explain` was asked for and has been printed. Raises UsageError."""
    loaded = load_run(door, argv)
    if loaded.explain:
        print(explain(loaded))
        return None
    refuse_owed(loaded.config, door.names(), loaded.own)
    apply_dotenv()
    return loaded


def new_console(*, is_quiet: bool = False) -> Console:
    """Where a command tells what it does: stdout; bars appear on a terminal only. Quiet: for ranks that leave
    speech to the main one.
    """
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True, quiet=is_quiet)
