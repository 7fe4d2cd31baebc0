"""Write the generated pages of docs/reference: settings.md, commands.md and python-api.md.

    python docs/generate_reference.py [--check]

`make docs` runs this before it builds the site. The pages are committed, so that they can also be read in the
repository; a test compares them with what this program writes. With `--check` nothing is written, and the
exit
code is 1 if a page is out of date.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import os
import re
import sys
from pathlib import Path

import llm_trainer
import llm_trainer.config
from llm_trainer.cli.main import main as run_llm_trainer
from llm_trainer.config.describe import reference

PAGES = Path(__file__).resolve().parent / "reference"

COMMANDS_OPENING = """\
# Commands

<!-- Written by `python docs/generate_reference.py`; edit the commands, not this page. -->

`llm-trainer COMMAND --help` prints the text below, `--help-all` describes every setting that a command reads,
and `--explain` prints the value and origin of each. [Configuration](configuration.md) explains how to set them,
and [settings](settings.md) lists them all. The scripts of the manuals call the same commands with
[other defaults](scripts.md). [Exit codes](run-folder.md#exit-codes) are the same for all commands.
"""

API_OPENING = """\
# Python API

<!-- Written by `python docs/generate_reference.py`; edit the docstrings, not this page. -->

These names are stable. Everything else in the package may change between versions.
"""


def main() -> int:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="Write nothing; fail if a page is out of date.")
    options = parser.parse_args()
    outdated = [name for name, text in pages().items() if _read(PAGES / name) != text]
    for name in outdated:
        if options.check:
            print(f"docs/reference/{name} is out of date; run: python docs/generate_reference.py")
        else:
            (PAGES / name).write_text(pages()[name], encoding="utf-8")
            print(f"wrote docs/reference/{name}")
    return int(options.check and bool(outdated))


def pages() -> dict[str, str]:
    """Return the text of each generated page by file name."""
    return {
        "settings.md": reference(),
        "commands.md": commands_page(),
        "python-api.md": python_api_page(),
    }


def commands_page() -> str:
    """Return the page of all commands, from their own help texts."""
    overview = _help()
    sections = [COMMANDS_OPENING]
    for command, summary in re.findall(r"^  ([a-z-]+)  +(\S.*)$", overview, re.MULTILINE):
        help_text = _help(command)
        sections.append(f"## {command}\n\n{_sentence(summary)}\n\n```text\n{help_text.strip()}\n```\n")
    return "\n".join(sections)


def python_api_page() -> str:
    """Return the page of the public names of `llm_trainer` and `llm_trainer.config`."""
    sections = [API_OPENING]
    for package in (llm_trainer, llm_trainer.config):
        names = [name for name in package.__all__ if name not in _documented_elsewhere(package)]
        sections.append(f"## {package.__name__}\n")
        sections += [_entry(getattr(package, name)) for name in sorted(names, key=str.lower)]
    return "\n".join(sections)


def _documented_elsewhere(package: object) -> set[str]:
    """Names of `llm_trainer.config` that `llm_trainer` exports too are documented once."""
    return set(llm_trainer.__all__) if package is llm_trainer.config else set()


def _entry(value: object) -> str:
    """Return the directive from which mkdocstrings renders a class or function."""
    home = inspect.getmodule(value)
    if home is None or not hasattr(value, "__qualname__"):
        return ""
    return f"::: {home.__name__}.{value.__qualname__}\n"


def _help(*command: str) -> str:
    """Return what `llm-trainer COMMAND --help` prints."""
    os.environ["COLUMNS"] = "100"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        run_llm_trainer([*command, "--help"])
    return printed.getvalue()


def _sentence(text: str) -> str:
    text = text[0].upper() + text[1:]
    return text if text.endswith((".", "?", "!")) else text + "."


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


if __name__ == "__main__":
    sys.exit(main())
