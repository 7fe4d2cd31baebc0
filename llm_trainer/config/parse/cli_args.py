"""Reading settings from a command line.

pydantic-settings' CLI source was tried for this (2.16). Its `cli_shortcuts` gives flat flags, but of two
aliases with two values it silently takes the last, it does not equate `-` and `_`, its unknown flags carry no
suggestion, and it cannot report where a value came from. Each of these needs a pass over argv. With that
done, what is left of its work is turning text into values, which pydantic itself does. It also costs 0.13 s
of import.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from llm_trainer.config.parse.merge import FieldKey, RawValue, SettingNames
from llm_trainer.config.resolve.precision import PRECISIONS
from llm_trainer.config.resolve.trainer_names import EVAL_STRATEGIES, SAVE_STRATEGIES
from llm_trainer.config.schema.base import Section, accepted_types
from llm_trainer.config.schema.run_config import dotted_aliases, section_types
from llm_trainer.errors import UsageError

_BOOLEANS = ("true", "false", "yes", "no", "on", "off", "0", "1")
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)([eE][-+]?\d+)?")


@dataclass
class ParsedArgs:
    """A parsed command line: settings, files, a preset, and positional arguments. `flags` holds every value
    of each setting, in order.
    """

    values: list[RawValue] = field(default_factory=list)
    flags: dict[FieldKey, list[RawValue]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    preset: str | None = None
    local_rank: int | None = None
    positional: list[str] = field(default_factory=list)
    explain: bool = False
    help: bool = False
    help_all: bool = False


def parse_args(argv: Sequence[str], names: SettingNames) -> ParsedArgs:
    """Parse a command line.

    Args:
        argv: The arguments, without the command itself.
        names: The settings that the command reads.

    Raises:
        UsageError: A flag is unknown or belongs to another command, or its value is missing.
    """
    parsed = ParsedArgs()
    arguments = list(argv)
    while arguments:
        argument = arguments.pop(0)
        if argument in ("-h", "--help"):
            parsed.help = True
        elif argument in ("--help-all", "--help_all"):
            parsed.help_all = True
        elif argument == "--":
            parsed.positional += arguments
            break
        elif argument.startswith("--"):
            _parse_flag(argument, arguments, names, parsed)
        elif argument.startswith("-") and len(argument) > 1:
            raise UsageError(
                f"unknown flag {argument}: flags begin with two dashes; did you mean -{argument}?"
            )
        else:
            parsed.positional.append(argument)
    return parsed


def _parse_flag(argument: str, arguments: list[str], names: SettingNames, parsed: ParsedArgs) -> None:
    flag, equals, text = argument.partition("=")
    name = flag[2:].replace("-", "_")
    value = text if equals else None
    if name in ("config", "config_file"):
        parsed.files.append(_required(flag, value, arguments))
    elif name == "preset":
        parsed.preset = _required(flag, value, arguments)
    elif name == "explain":
        parsed.explain = value is None or value.lower() not in ("false", "0", "no")
    elif name == "local_rank":  # python -m torch.distributed.launch adds it
        parsed.local_rank = _rank(flag, _required(flag, value, arguments))
    else:
        section, alias = _find(flag, name, names)
        kind = names.section_class(section)
        if value is None:
            value = _next_value(flag, kind, alias, arguments)
        # Names of other sections (training.gradient_checkpointing) may contradict the setting's own.
        key = (section, name if name in dotted_aliases() else alias)
        _add(RawValue(name, typed_value(kind, alias, value), flag), key, parsed)


def _add(raw: RawValue, key: FieldKey, parsed: ParsedArgs) -> None:
    """Add the value of a flag. Lists of a repeated flag are joined (`--stop a --stop b`); of other values the
    last one wins, so that a script may append its own arguments to given ones.
    """
    before = parsed.flags.get(key, [])
    parsed.flags[key] = [*before, raw]
    if before:
        parsed.values.remove(before[-1])
        if isinstance(raw.value, list) and isinstance(before[-1].value, list):
            raw = replace(raw, value=[*before[-1].value, *raw.value])
        else:
            raw = replace(raw, source=f"{raw.source} (the last of {len(before) + 1})")
        parsed.flags[key][-1] = raw
    parsed.values.append(raw)


def _find(flag: str, name: str, names: SettingNames) -> tuple[str, str]:
    """The section and name behind a flag, among those that this command reads."""
    section, alias = _resolve(flag, name, names)
    canonical = names.section_class(section).names()[alias.partition(".")[0]]
    if not names.reads(section, canonical):
        raise UsageError(
            f"{flag}: this command does not read {section}.{canonical}; it reads {', '.join(names.sections)}"
        )
    return section, alias


def _resolve(flag: str, name: str, names: SettingNames) -> tuple[str, str]:
    try:
        return names.find(RawValue(name, None, flag))
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
        raise UsageError(f"invalid value for {flag}: {value!r} is not a whole number; the launcher sets it")
    return int(value)


def _next_value(flag: str, kind: type[Section], alias: str, arguments: list[str]) -> str:
    """The value of a flag written without `=`: the next argument, but for switches only where that is a value
    of theirs.
    """
    words = _switch_words(kind, alias)
    following = arguments[0] if arguments else None
    if words is not None:
        return arguments.pop(0) if following is not None and following.lower() in words else "true"
    bare_value = kind.setting_of(kind.names()[alias.partition(".")[0]]).bare_value
    if bare_value is not None and (following is None or following.startswith("--")):
        return bare_value
    return _required(flag, None, arguments)


def _switch_words(kind: type[Section], alias: str) -> frozenset[str] | None:
    """The values of a flag that may also be given without one (`--eval_only`, `--compile`,
    `--mixed_precision`), else None.
    """
    name = kind.names().get(alias.partition(".")[0], alias)
    if "." in alias or alias in (*EVAL_STRATEGIES, *SAVE_STRATEGIES):
        return None
    accepted = accepted_types(kind, name)
    if alias in kind.setting_of(name).shorthands:
        return frozenset((*_BOOLEANS, *(PRECISIONS if name == "precision" else ())))
    if bool in accepted or {"on", "off"} <= accepted:
        return frozenset((*_BOOLEANS, *(word for word in accepted if isinstance(word, str))))
    return None


def _json(alias: str, text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"invalid value for {alias}: {text!r} is not JSON: {error}") from None


def typed_value(kind: type[Section], alias: str, text: str) -> object:
    """Convert the text of a flag to the type of its field. It is validated later.

    Args:
        kind: The section of the field.
        alias: Any name of the field.
        text: The text of the flag.

    Raises:
        UsageError: The text cannot be converted.
    """
    name = kind.names()[alias.partition(".")[0]]
    accepted = accepted_types(kind, name)
    if list in accepted and alias not in kind.setting_of(name).shorthands:
        return kind.normalize({name: text})[name]
    is_text = kind.setting_of(name).none_is_text
    if text.lower() in ("none", "null") and type(None) in accepted and not is_text:
        return None
    if str in accepted:
        return text
    if text.startswith("{"):
        return _json(alias, text)
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if _NUMBER.fullmatch(text) and not {word for word in accepted if isinstance(word, str)}:
        with contextlib.suppress(ValueError):
            return int(text)  # not through a float, which has 16 digits
        number = float(text.replace("_", ""))
        return int(number) if number.is_integer() and abs(number) < 2**53 else number
    return text
