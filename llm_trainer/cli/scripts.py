"""The manuals' scripts: which command each of them is.

Only the standard library is imported at the top, so that a script which runs before its dependencies are
installed can still say which are missing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llm_trainer.cli.dispatch import run_command
from llm_trainer.cli.runtime_env import replace_unencodable_output

# A manual's script → the module in cli/commands and its function.
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
    "scripts/download_datasets.py": ("download", "script"),
    "scripts/prepare_data.py": ("prepare", "splits"),
    "scripts/process_data.py": ("process_data", "run"),
    "scripts/prepare_domain_datasets.py": ("prepare_domains", "script"),
}

# A manual's script that is not implemented yet → what it will do.
NOT_IMPLEMENTED_SCRIPTS: dict[str, str] = {
    "serve.py": "the server (OpenAI's protocol, with a web page)",
    "profile_model.py": "time by layer",
    "scripts/run_tests.py": "checks of a trained model",
    "scripts/test_all_reasoning.py": "the reasoning suites",
}


def script(name: str, argv: Sequence[str] | None = None) -> int:
    """Run a script of the manuals.

    Args:
        name: Its path from the repository's root.
        argv: Its arguments (default: the process's).

    Returns:
        The exit code.
    """
    _move_scripts_last_on_path()
    replace_unencodable_output()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if name in NOT_IMPLEMENTED_SCRIPTS:
        feature = NOT_IMPLEMENTED_SCRIPTS[name]
        print(
            f"error: {name} is not implemented yet: {feature}\nTry 'llm-trainer --help' for the commands "
            "that are.",
            file=sys.stderr,
        )
        return 2
    module, function = SCRIPTS[name]
    return run_command(module, function, arguments, f"python {name}", ends_process=argv is None)


def _move_scripts_last_on_path() -> None:
    """Move the folders that a script put on `sys.path` to its end.

    The root's `evaluate.py` and `model.py` would otherwise shadow packages of the same names (lm-eval imports
    `evaluate`). They stay on the path, last, so that worker processes of a clone that is not installed still
    find this package.
    """
    root = Path(__file__).resolve().parents[2]
    own = {os.fspath(root), os.fspath(root / "scripts")}
    sys.path[:] = [folder for folder in sys.path if os.path.realpath(folder or ".") not in own]
    sys.path.append(os.fspath(root))
