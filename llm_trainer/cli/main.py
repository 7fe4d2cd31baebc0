"""`llm-trainer`: finds the command, runs it, and turns every error that a user can fix into a message and an
exit code.

Only the standard library is imported at the top. So `--help` answers at once, and a script that runs before
its dependencies are installed can still say which are missing. A command's module is imported when the
command is called.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

from llm_trainer.cli.dispatch import run_command
from llm_trainer.cli.errors import run_with_error_handling
from llm_trainer.cli.runtime_env import replace_unencodable_output

# Command → its module in cli/commands and what it does. Each module has `run(argv) -> int | None`.
COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": (
        "quickstart",
        "gather text, train a tokenizer and a small model, sample, report: in minutes",
    ),
    "download": ("download", "download public datasets by name"),
    "prepare": ("prepare", "turn text into splits, a tokenizer and token shards"),
    "prepare-domains": ("prepare_domains", "prepare datasets by domain and a mixture to train on"),
    "preflight": ("preflight", "estimate the memory of a training step: will it fit?"),
    "train": ("train", "train a model"),
    "generate": ("generate", "continue a prompt with a model"),
    "evaluate": ("evaluate", "measure loss, perplexity and bits per byte of a model on a text"),
    "report": ("report", "write report.html of a run: curves, samples, settings, machine"),
    "verify-resume": ("verify_resume", "check that resuming a run is bit-exact"),
    "export-adapter": ("export_adapter", "write a LoRA adapter as a PEFT folder, or merge it into the model"),
    "presets": ("presets", "list the named model shapes with their parameter counts"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `llm-trainer`.

    Args:
        argv: Its arguments (default: the process's).

    Returns:
        The exit code.
    """
    replace_unencodable_output()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) > 1 and arguments[0] == "help":  # help train
        arguments = [arguments[1], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "--help-all", "help"):
        return run_with_error_handling(lambda: print(overview()))
    if arguments[0] in ("-V", "--version"):
        from llm_trainer import __version__

        return run_with_error_handling(lambda: print(f"llm-trainer {__version__}"))
    command = arguments[0].replace("_", "-")
    if command not in COMMANDS:
        return run_with_error_handling(lambda: _unknown_command(arguments[0]))
    return run_command(
        COMMANDS[command][0], "run", arguments[1:], f"llm-trainer {command}", ends_process=argv is None
    )


def overview() -> str:
    """The text of `llm-trainer --help`."""
    width = max(map(len, COMMANDS))
    lines = [
        "usage: llm-trainer COMMAND [settings]",
        "",
        "Train language models: from a folder of text to a model that generates text. Start with",
        "`llm-trainer quickstart`.",
        "",
        *(f"  {name:<{width}}  {meaning}" for name, (_, meaning) in COMMANDS.items()),
        "",
        "llm-trainer COMMAND --help      the settings that people set, --help-all lists all of them",
        "llm-trainer COMMAND --explain   the value of every setting and where it came from",
        "llm-trainer --version",
        "",
        "Settings are given as --hidden_size 768, --hidden-size=768, --model.hidden_size 768 or in a file:",
        "--config run.yaml",
    ]
    return "\n".join(lines)


def _unknown_command(name: str) -> int:
    import difflib

    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    with contextlib.suppress(OSError):  # stderr has no reader
        print(
            f"error: unknown command {name!r}{hint}\nTry 'llm-trainer --help' for the list of commands.",
            file=sys.stderr,
        )
    return 2
