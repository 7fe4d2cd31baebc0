"""Runs the function of a command's module. The module is imported only now: the others stay unread."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from llm_trainer.cli.errors import run_with_error_handling
from llm_trainer.cli.runtime_env import before_imports


def run_command(
    module: str, function: str, argv: Sequence[str], invocation: str, *, ends_process: bool = False
) -> int:
    """Run a command.

    Args:
        module: Its module in cli/commands.
        function: The function, which takes the arguments and returns the exit code or None.
        argv: The arguments.
        invocation: The command as it is typed, for messages: `llm-trainer train`, `python train.py`.
        ends_process: Whether the process ends with this command. One rank of several exits here then.

    Returns:
        The exit code.
    """
    code = run_with_error_handling(lambda: _load(module, function)(list(argv)), invocation)
    process_group = sys.modules.get("llm_trainer.distributed.process_group")
    if ends_process and process_group is not None and os.environ.get("WORLD_SIZE", "1") != "1":
        process_group.exit_process(code)
    return code


def _load(module: str, function: str) -> Callable[[list[str]], int | None]:
    before_imports()
    imported = importlib.import_module(f"llm_trainer.cli.commands.{module}")
    loaded: Callable[[list[str]], int | None] = getattr(imported, function)
    return loaded
