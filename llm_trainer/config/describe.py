"""Descriptions of the settings, generated from the schema: `--help`, `--explain` and the reference page.

`--help` shows the settings that people change most often (`common` in the schema), and `--help-all` shows all
of them, under the same headings. The reference page is written by `python -m llm_trainer.config.describe >
docs/reference/settings.md`.
"""

from __future__ import annotations

import shutil
import textwrap
from types import NoneType

from llm_trainer.config.duration import Duration
from llm_trainer.config.parse.command import CommandSpec, LoadedRun
from llm_trainer.config.parse.implied_defaults import origin_of
from llm_trainer.config.parse.merge import COMMAND_OPTIONS, FieldKey
from llm_trainer.config.schema.base import Section, accepted_types, list_choices
from llm_trainer.config.schema.run_config import section_types

_INDENT = 28
_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", bool: "BOOL", list: "A,B,...", Duration: "LENGTH"}


def help_text(spec: CommandSpec, *, show_all: bool = False) -> str:
    """The help of a command.

    Args:
        spec: The command.
        show_all: Show every setting with its other names, instead of the common ones.
    """
    width = max(60, min(shutil.get_terminal_size().columns, 100))
    positional = "".join(f" [{name.upper()}]" for name in spec.positional)
    positional += " [FILE ...]" if spec.positional_config else ""
    lines = [f"usage: {spec.invocation}{positional} [--config FILE] [--SETTING VALUE ...]", ""]
    lines += [*textwrap.wrap(spec.summary, width), "", "General:"]
    lines += _entry(
        "--config FILE",
        "Read settings from a .json, .yaml or .py file. May be repeated; later files override earlier ones.",
        width,
    )
    if "model" in spec.sections:
        lines += _entry("--preset NAME", "Use a named model shape; `llm-trainer presets` lists them.", width)
    lines += _entry("--explain", "Print every setting with its value, origin, unit and meaning.", width)
    hidden = len(spec.names().fields()) - len(_common_fields(spec))
    lines += _entry(
        "--help", "Print this help." if show_all or not hidden else "Print the common settings.", width
    )
    if hidden:
        lines += _entry("--help-all", "Print all settings, with their other names.", width)
    for heading, keys in _by_heading(spec, show_all).items():
        lines += ["", f"{heading}:"]
        for key in keys:
            lines += _entry(_flag(spec, key), _describe(spec, key, show_all), width)
    if hidden and not show_all:
        lines += ["", f"{hidden} more settings: {spec.invocation} --help-all"]
    return "\n".join(lines)


def _common_fields(spec: CommandSpec) -> list[FieldKey]:
    """The settings that `--help` shows. Of a command's own options these are all, unless some are marked."""
    names, shown = spec.names(), []
    trains = "training" in spec.sections
    marks_options = spec.options is not None and any(
        spec.options.setting_of(name).common for name in spec.options.model_fields
    )
    for section, name in names.fields():
        common = names.section_class(section).setting_of(name).common
        is_option = section == COMMAND_OPTIONS and not marks_options
        if is_option or common is True or (common == "preparation" and not trains):
            shown.append((section, name))
    return shown


def _by_heading(spec: CommandSpec, show_all: bool) -> dict[str, list[FieldKey]]:
    names = spec.names()
    grouped: dict[str, list[FieldKey]] = {}
    for section, name in names.fields() if show_all else _common_fields(spec):
        grouped.setdefault(names.section_class(section).headings()[name], []).append((section, name))
    return grouped


def _flag(spec: CommandSpec, key: FieldKey) -> str:
    section, name = key
    names = spec.names()
    kind = names.section_class(section)
    accepted = accepted_types(kind, name) - {NoneType}
    words = [str(value) for value in accepted if not isinstance(value, type)]
    types = sorted(_METAVARS.get(one, "JSON") for one in accepted if isinstance(one, type))
    metavar = f"{{{','.join(sorted(words))}}}" if words and not types else "|".join([*types, *sorted(words)])
    choices = [str(choice) for choice in list_choices(kind, name)]
    if choices:
        metavar = metavar.replace(_METAVARS[list], f"{{{','.join(choices)}}},...")
    # A flat name that belongs to several sections sets the first one; the others need their section.
    flat = names.table().get(name) == key or section == COMMAND_OPTIONS
    return f"--{name if flat else f'{section}.{name}'} {metavar}"


def _describe(spec: CommandSpec, key: FieldKey, with_aliases: bool) -> str:
    section, name = key
    kind = spec.names().section_class(section)
    field, declared = kind.model_fields[name], kind.setting_of(name)
    default = spec.defaults.get(
        f"{section}.{name}" if section != COMMAND_OPTIONS else name,
        field.get_default(call_default_factory=True),
    )
    facts = [f"unit: {declared.unit}"] if declared.unit else []
    shown = _shown_default(default)
    facts += [f"default: {shown}"] if shown is not None else []
    facts += ["not implemented in this version"] if declared.not_implemented else []
    text = f"{field.description}" + (f" [{'; '.join(facts)}]" if facts else "")
    others = [f"--{other}" for other in (*declared.aliases, *declared.shorthands)]
    return f"{text} Also: {', '.join(others)}." if with_aliases and others else text


def _shown_default(default: object) -> str | None:
    """A default as a user would write it; None where there is nothing to show."""
    if default is None or default in ([], {}, ""):
        return None
    if isinstance(default, list):
        return ",".join(map(str, default))
    if isinstance(default, str) and default != default.strip():
        return repr(default)
    return None if isinstance(default, Section) else str(default)


def _entry(flag: str, description: str, width: int) -> list[str]:
    indent = " " * _INDENT
    body = textwrap.wrap(description, width - _INDENT) or [""]
    head = f"  {flag}"
    first = (
        [f"{head:<{_INDENT}}{body[0]}"]
        if len(head) < _INDENT - 1
        else [*_wrap_flag(flag, width), indent + body[0]]
    )
    return [*first, *(indent + line for line in body[1:])]


def _wrap_flag(flag: str, width: int) -> list[str]:
    return textwrap.wrap(flag, width, initial_indent="  ", subsequent_indent=" " * 6, break_on_hyphens=False)


def explain(loaded: LoadedRun) -> str:
    """The text of `--explain`: one aligned line per setting, which can be searched and compared.

    Args:
        loaded: The parsed command line.

    Returns:
        A table of the dotted name, the value, its origin, its unit and its meaning.
    """
    rows: list[tuple[str, str, str, str, str]] = []
    for section, name in loaded.spec.names().fields():
        values = loaded.options if section == COMMAND_OPTIONS else getattr(loaded.config, section)
        assert isinstance(values, Section)
        dotted = f"{section}.{name}" if section else name
        field, declared = type(values).model_fields[name], type(values).setting_of(name)
        value = getattr(values, name)
        shown = "none" if value is None else repr(value) if isinstance(value, str) else str(value)
        origin = origin_of(values, name, loaded.origins, dotted)
        rows.append((dotted, shown, origin, declared.unit or "", field.description or ""))
    header = ("setting", "value", "origin", "unit", "meaning")
    widths = [min(44, max(len(row[column]) for row in [header, *rows])) for column in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip()
        for row in [header, *rows]
    )


def reference() -> str:
    """All settings as a Markdown page, with one table per section."""
    lines = [
        "# All settings",
        "",
        "Generated from the schema by `python -m llm_trainer.config.describe > docs/reference/settings.md`.",
        "[Configuration](configuration.md) describes how to set them. A dotted name is an alias in another "
        "section. Settings",
        "marked with † are accepted, but the feature is not implemented: setting them to another value is an "
        "error.",
    ]
    for name, kind in section_types().items():
        lines += [
            "",
            f"## {name}",
            "",
            (kind.__doc__ or "").strip().split("\n")[0],
            "",
            "| setting | default | unit | meaning | also |",
            "|---|---|---|---|---|",
        ]
        lines += [_reference_row(kind, field) for field in kind.model_fields]
    return "\n".join(lines) + "\n"


def _reference_row(kind: type[Section], name: str) -> str:
    field, declared = kind.model_fields[name], kind.setting_of(name)
    default = field.get_default(call_default_factory=True)
    shown = "none" if default is None else f"`{default}`"
    others = (*declared.aliases, *declared.shorthands, *declared.dotted_aliases)
    also = ", ".join(f"`{other}`" for other in others)
    mark = " †" if declared.not_implemented else ""
    meaning = (field.description or "").replace("|", "\\|")
    return f"| `{name}`{mark} | {shown} | {declared.unit or ''} | {meaning} | {also} |"


if __name__ == "__main__":
    print(reference(), end="")
