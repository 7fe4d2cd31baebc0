"""`--help` of a command, from the schema: flags by section with meaning, unit, default and every other name."""

from __future__ import annotations

import shutil
import textwrap
from typing import TYPE_CHECKING

from llm_trainer.config.parse.merge import OWN, Field

if TYPE_CHECKING:
    from llm_trainer.config.parse.loader import Door


def help_text(door: Door) -> str:
    """The text that `--help` prints."""
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    positional = "".join(f" [{name.upper()}]" for name in door.positional) + (
        " [config/FILE.py]" if door.positional_config else ""
    )
    lines = [f"usage: {door.name}{positional} [--config FILE] [--setting VALUE …]", "", door.summary, ""]
    lines += ["general"]
    lines += _entry(
        "--config FILE", "settings from a .json, .yaml or .py file; may be given again, later ones win", width
    )
    if "model" in door.sections:
        lines += _entry("--preset NAME", "a named shape; `llm-trainer presets` lists them", width)
    lines += _entry("--explain", "print every setting: value, where it came from, unit, meaning", width)
    names = door.names()
    section = None
    for home, name in names.fields():
        kind = names.kind(home)
        if home != section:
            lines += ["", f"{home or door.name}: {_first_line(kind.__doc__)}"]
            section = home
        lines += _entry(f"--{name}", _meaning(door, (home, name)), width)
    return "\n".join(lines)


def _meaning(door: Door, key: Field) -> str:
    home, name = key
    kind = door.names().kind(home)
    field, declared = kind.model_fields[name], kind.setting_of(name)
    default = door.defaults.get(
        f"{home}.{name}" if home != OWN else name, field.get_default(call_default_factory=True)
    )
    facts = [f"in {declared.unit}"] if declared.unit else []
    facts += (
        [f"default {'none' if default is None else default}"]
        if isinstance(default, (bool, int, float, str, list, type(None)))
        else [f"default {default}"]
    )
    facts += ["not built yet"] if declared.owed else []
    others = [f"--{other}" for other in (*declared.aliases, *declared.spellings)]
    return f"{field.description} ({'; '.join(facts)})" + (f"; also {', '.join(others)}" if others else "")


def _entry(flag: str, meaning: str, width: int) -> list[str]:
    indent = " " * 34
    body = textwrap.wrap(meaning, width - len(indent)) or [""]
    head = f"  {flag}"
    first = [f"{head:<34}{body[0]}"] if len(head) < 33 else [head, indent + body[0]]
    return [*first, *(indent + line for line in body[1:])]


def _first_line(text: str | None) -> str:
    return (text or "").strip().split("\n")[0]
