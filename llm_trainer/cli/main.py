"""`llm-trainer`: find the command, run it, and turn everything that a user can mend into one message and an
exit status.

Only the standard library is imported at the top. So `--help` answers at once, and a script that runs before
its dependencies are installed can still say which are missing. A command's module is imported when the
command is called.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from llm_trainer.cli.errors import guarded
from llm_trainer.cli.runtime_env import before_imports, replace_what_streams_lack

# Command → its module and what it does. Each module has `run(argv) -> int | None`.
COMMANDS: dict[str, tuple[str, str]] = {
    "download": ("download", "fetch public data sets by name"),
    "prepare": ("prepare", "text → cleaned splits, tokenizer and token shards"),
    "domains": ("domains", "data sets by domain → splits, terms and a mixture to train on"),
    "preflight": ("preflight", "will it fit? a step's memory by part on each rank"),
    "train": ("train", "train a model"),
    "generate": ("generate", "let a model go on from a prompt"),
    "evaluate": ("evaluate", "loss, perplexity and bits per byte of a model on a text"),
    "adapter": ("adapter", "a model's low-rank adapter as a folder of PEFT's, or merged into the model"),
    "presets": ("presets", "list the named shapes, with their true parameter counts"),
    "verify-resume": (
        "verify_resume",
        "replay the steps after a checkpoint and say whether resuming is exact",
    ),
    "report": ("report", "write report.html of a run: curves, samples, settings, machine"),
    "quickstart": (
        "quickstart",
        "the whole way in minutes: gather text, train a tokenizer and a model, sample, report",
    ),
}

# A manual's script → the module and function behind it.
SCRIPTS: dict[str, tuple[str, str]] = {
    "train.py": ("train", "framework"),
    "train_aio.py": ("train_aio", "run"),
    "train_refactored.py": ("train", "orchestrator"),
    "data_prep_tool.py": ("prepare", "framework"),
    "sample.py": ("generate", "sample"),
    "generate.py": ("generate", "enhanced"),
    "evaluate.py": ("evaluate", "enhanced"),
    "debug_memory.py": ("preflight", "debug_memory"),
    "scripts/train.py": ("train", "trainer"),
    "scripts/generate.py": ("generate", "l1"),
    "scripts/evaluate.py": ("evaluate", "l1"),
    "scripts/download_datasets.py": ("download", "run"),
    "scripts/prepare_data.py": ("prepare", "splits"),
    "scripts/process_data.py": ("process_data", "run"),
    "scripts/prepare_domain_datasets.py": ("domains", "run"),
}

# A manual's script that comes later → what it will do.
OWED_SCRIPTS: dict[str, str] = {
    "serve.py": "the server (OpenAI's protocol, with a web page)",
    "profile_model.py": "time by layer",
    "scripts/run_tests.py": "checks of a trained model",
    "scripts/test_all_reasoning.py": "the reasoning suites",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `llm-trainer` with these arguments (default: the process's) and return its exit status."""
    replace_what_streams_lack()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        from llm_trainer import __version__

        print(f"llm-trainer {__version__}")
        return 0
    command = arguments[0].replace("_", "-")
    if command not in COMMANDS:
        return _unknown(arguments[0])
    status = guarded(lambda: _load(COMMANDS[command][0], "run")(arguments[1:]))
    return _ended(status) if argv is None else status


def script(name: str, argv: Sequence[str] | None = None) -> int:
    """Run one of the manuals' scripts, named relative to the repository's root, and return its exit status."""
    _leave_search_path()
    replace_what_streams_lack()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if name in OWED_SCRIPTS:
        print(
            f"{name}: {OWED_SCRIPTS[name]} is not built yet; `llm-trainer --help` lists what is",
            file=sys.stderr,
        )
        return 2
    module, function = SCRIPTS[name]
    status = guarded(lambda: _load(module, function)(arguments))
    return _ended(status) if argv is None else status


def _ended(status: int) -> int:
    """The process's status, at its very end: a rank of several leaves here."""
    process_group = sys.modules.get("llm_trainer.distributed.process_group")
    if process_group is not None and os.environ.get("WORLD_SIZE", "1") != "1":
        process_group.exit_process(status)
    return status


def overview() -> str:
    """The text of `llm-trainer --help`."""
    width = max(map(len, COMMANDS))
    lines = [
        "usage: llm-trainer COMMAND [settings]",
        "",
        "From a folder of text to a language model. Start with `llm-trainer quickstart`.",
        "",
        *(f"  {name:<{width}}  {meaning}" for name, (_, meaning) in COMMANDS.items()),
        "",
        "`llm-trainer COMMAND --help` lists a command's settings, `--explain` shows their values and where each came from.",
        "Settings are given as --hidden_size 768, --hidden-size=768, --model.hidden_size 768 or in a file: --config run.yaml",
    ]
    return "\n".join(lines)


def _unknown(given: str) -> int:
    import difflib

    close = difflib.get_close_matches(given, COMMANDS, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    print(f"llm-trainer has no command {given!r}{hint} It knows {', '.join(COMMANDS)}.", file=sys.stderr)
    return 2


def _load(module: str, function: str) -> Callable[[list[str]], int | None]:
    before_imports()
    loaded: Callable[[list[str]], int | None] = getattr(
        importlib.import_module(f"llm_trainer.cli.{module}"), function
    )
    return loaded


def _leave_search_path() -> None:
    """Move the folders that a script put on `sys.path` to its end.

    The root's `evaluate.py` and `model.py` would else shadow packages of the same names (lm-eval imports
    `evaluate`). They stay on the path, last, so that worker processes of a clone that is not installed still
    find this package.
    """
    root = Path(__file__).resolve().parents[2]
    own = {os.fspath(root), os.fspath(root / "scripts")}
    sys.path[:] = [folder for folder in sys.path if os.path.realpath(folder or ".") not in own]
    sys.path.append(os.fspath(root))
