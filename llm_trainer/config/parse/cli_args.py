"""Reading settings from a command line.

pydantic-settings' CLI source was tried for this (2.16): `cli_shortcuts` gives flat flags, but of two aliases
with two values it silently takes the last, it does not equate `-` and `_`, its unknown flags carry no
suggestion, and it cannot tell where a value came from. Each of these needs a pass over argv; with that done,
what is left of its work is turning text into values, which pydantic itself does. It also costs 0.13 s of
import.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from llm_trainer.config.parse.merge import Names, Said
from llm_trainer.config.resolve.precision import PRECISIONS
from llm_trainer.config.schema.base import Section, kinds_of
from llm_trainer.config.schema.run_config import section_types
from llm_trainer.errors import UsageError

_BOOLEANS = ("true", "false", "yes", "no", "on", "off", "0", "1")
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)([eE][-+]?\d+)?")


@dataclass
class CommandLine:
    """What a command line says: settings, files, a preset, and what stands without a flag."""

    said: list[Said] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    preset: str | None = None
    local_rank: int | None = None
    positional: list[str] = field(default_factory=list)
    explain: bool = False
    help: bool = False


def read_flags(argv: Sequence[str], names: Names) -> CommandLine:
    """Take a command line apart; raises UsageError for unknown flags, flags of other commands and missing
    values.
    """
    line = CommandLine()
    arguments = list(argv)
    while arguments:
        argument = arguments.pop(0)
        if argument in ("-h", "--help"):
            line.help = True
        elif argument == "--":
            line.positional += arguments
            break
        elif argument.startswith("--"):
            _read_flag(argument, arguments, names, line)
        elif argument.startswith("-") and len(argument) > 1:
            raise UsageError(f"{argument}: flags begin with two dashes; did you mean -{argument}?")
        else:
            line.positional.append(argument)
    return line


def _read_flag(argument: str, arguments: list[str], names: Names, line: CommandLine) -> None:
    flag, equals, text = argument.partition("=")
    name = flag[2:].replace("-", "_")
    value = text if equals else None
    if name in ("config", "config_file"):
        line.files.append(_required(flag, value, arguments))
    elif name == "preset":
        line.preset = _required(flag, value, arguments)
    elif name == "explain":
        line.explain = value is None or value.lower() not in ("false", "0", "no")
    elif name in ("local_rank",):  # what python -m torch.distributed.launch puts in front
        line.local_rank = _rank(flag, _required(flag, value, arguments))
    else:
        section, spelled = _find(flag, name, names)
        kind = names.kind(section)
        if value is None:
            value = _next_value(flag, kind, spelled, arguments)
        said = Said(name, typed_value(kind, spelled, value), flag)
        before = next((item for item in line.said if item.name == name), None)
        if (
            before is not None and isinstance(before.value, list) and isinstance(said.value, list)
        ):  # --stop a --stop b
            line.said.remove(before)
            said = Said(name, [*before.value, *said.value], flag)
        line.said.append(said)


def _find(flag: str, name: str, names: Names) -> tuple[str, str]:
    """The section and name behind a flag, only among those that this command reads."""
    section, spelled = _resolve(flag, name, names)
    canonical = names.kind(section).names()[spelled.partition(".")[0]]
    if not names.reads(section, canonical):
        raise UsageError(
            f"{flag}: this command does not read {section}.{canonical}; it reads {', '.join(names.sections)}"
        )
    return section, spelled


def _resolve(flag: str, name: str, names: Names) -> tuple[str, str]:
    try:
        return names.find(Said(name, None, flag))
    except UsageError:
        elsewhere = [section for section, kind in section_types().items() if name in kind.names()]
        if elsewhere and "." not in name:
            raise UsageError(
                f"{flag} is a setting of the section {elsewhere[0]!r}, which this command does not read"
            ) from None
        raise


def _required(flag: str, value: str | None, arguments: list[str]) -> str:
    if value is not None:
        return value
    if not arguments or arguments[0].startswith("--"):
        raise UsageError(f"{flag} needs a value: {flag}=VALUE")
    return arguments.pop(0)


def _rank(flag: str, value: str) -> int:
    if not re.fullmatch(r"-?\d+", value):
        raise UsageError(f"{flag}={value!r} must be a whole number; the launcher sets it")
    return int(value)


def _next_value(flag: str, kind: type[Section], spelled: str, arguments: list[str]) -> str:
    """The value of a flag written without `=`: the next argument, but for switches only where that reads as
    one of theirs.
    """
    words = _switch_words(kind, spelled)
    ahead = arguments[0] if arguments else None
    if words is not None:
        return arguments.pop(0) if ahead is not None and ahead.lower() in words else "true"
    bare = kind.setting_of(kind.names()[spelled.partition(".")[0]]).bare
    if bare is not None and (ahead is None or ahead.startswith("--")):
        return bare
    return _required(flag, None, arguments)


def _switch_words(kind: type[Section], spelled: str) -> frozenset[str] | None:
    """The words that a flag takes if it may also stand alone (`--eval_only`, `--compile`,
    `--mixed_precision`), else None.
    """
    name = kind.names().get(spelled.partition(".")[0], spelled)
    if "." in spelled:
        return None
    kinds = kinds_of(kind, name)
    if spelled in kind.setting_of(name).spellings:
        return frozenset((*_BOOLEANS, *(PRECISIONS if name == "precision" else ())))
    if bool in kinds or {"on", "off"} <= kinds:
        return frozenset((*_BOOLEANS, *(word for word in kinds if isinstance(word, str))))
    return None


def _json(spelled: str, text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"{spelled}={text!r} is not JSON: {error}") from None


def typed_value(kind: type[Section], spelled: str, text: str) -> object:
    """The text of a flag as the field's kind of value; pydantic judges it later."""
    name = kind.names()[spelled.partition(".")[0]]
    if list in kinds_of(kind, name) and spelled not in kind.setting_of(name).spellings:
        return kind.settle({name: text})[name]
    if text.lower() in ("none", "null") and type(None) in kinds_of(kind, name):
        return None
    if str in kinds_of(kind, name):
        return text
    if text.startswith("{"):
        return _json(spelled, text)
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if _NUMBER.fullmatch(text) and not {word for word in kinds_of(kind, name) if isinstance(word, str)}:
        with contextlib.suppress(ValueError):
            return int(text)  # not through a float, which has 16 digits
        number = float(text.replace("_", ""))
        return int(number) if number.is_integer() and abs(number) < 2**53 else number
    return text
