"""How a setting is declared: one canonical field with its other names, its unit and its help text.

`setting()` wraps pydantic's `Field`. `Section` is the base of every group of settings. It accepts any alias
as a keyword argument, as a key of a file or in an assignment. It rejects unknown names with a suggestion, and
it rejects two different values for one setting.

An assignment validates the one field alone, and not the whole section as pydantic's `validate_assignment`
would: a script may set `hidden_size` on one line and `num_attention_heads` on the next, though only the two
together make a valid shape.
"""

from __future__ import annotations

import difflib
import functools
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import ErrorDetails

from llm_trainer.config.training_arguments import INSTEAD
from llm_trainer.errors import UsageError

MAX_SEED = 2**63 - 1  # the largest seed that PyTorch's generators accept


@dataclass(frozen=True)
class Setting:
    """What a field declares beyond its type, bounds and help text.

    Attributes:
        unit: `tokens`, `steps`, `seconds`, …
        aliases: Other names in the same section.
        dotted_aliases: Names in other sections (`training.gradient_checkpointing`) that mean this field.
        shorthands: Names whose value is translated (`fp16: true` becomes `precision: fp16`).
        not_implemented: A value other than the default asks for a feature that does not exist yet.
        bare_value: Value of the flag when it is given without one (`--resume`).
        split_commas: Whether a text for a list is split at its commas.
        none_is_text: Whether `none` and `null` on the command line are text like any other, not "unset".
        common: Whether `--help` shows the setting; `"preparation"`: only for commands that do not train.
        heading: Heading in the help of this field and of those after it; None continues the previous one.
    """

    unit: str | None = None
    aliases: tuple[str, ...] = ()
    dotted_aliases: tuple[str, ...] = ()
    shorthands: tuple[str, ...] = ()
    not_implemented: bool = False
    bare_value: str | None = None
    split_commas: bool = True
    none_is_text: bool = False
    common: bool | Literal["preparation"] = False
    heading: str | None = None


def setting(
    default: Any,
    description: str,
    *,
    unit: str | None = None,
    aliases: tuple[str, ...] = (),
    dotted_aliases: tuple[str, ...] = (),
    shorthands: tuple[str, ...] = (),
    not_implemented: bool = False,
    bare_value: str | None = None,
    split_commas: bool = True,
    none_is_text: bool = False,
    common: bool | Literal["preparation"] = False,
    heading: str | None = None,
    **bounds: Any,
) -> Any:
    """Declare a setting.

    Args:
        default: The default value; a callable is a factory of it.
        description: The help text, in full sentences.
        unit: As the other arguments up to `heading`: see `Setting`.
        **bounds: pydantic's bounds (`ge`, `gt`, `le`, `lt`, `min_length`, …).

    Returns:
        A pydantic field.
    """
    declared = Setting(
        unit=unit,
        aliases=aliases,
        dotted_aliases=dotted_aliases,
        shorthands=shorthands,
        not_implemented=not_implemented,
        bare_value=bare_value,
        split_commas=split_commas,
        none_is_text=none_is_text,
        common=common,
        heading=heading,
    )
    keyword = "default_factory" if callable(default) else "default"
    extra: dict[str, Any] = {"setting": declared}
    return Field(description=description, json_schema_extra=extra, **{keyword: default}, **bounds)


class Section(BaseModel):
    """A group of settings. Keyword arguments, file keys and assignments accept aliases and are validated."""

    model_config = ConfigDict(
        extra="forbid", protected_namespaces=(), use_enum_values=True, allow_inf_nan=False
    )

    help_heading: ClassVar[str] = "Options"

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UsageError(validation_message(error, type(self))) from None

    @classmethod
    def setting_of(cls, name: str) -> Setting:
        """The `Setting` of the field with this canonical name."""
        extra = cls.model_fields[name].json_schema_extra
        found = extra.get("setting") if isinstance(extra, dict) else None
        return found if isinstance(found, Setting) else Setting()

    @classmethod
    def names(cls) -> Mapping[str, str]:
        """Every name that the section accepts (canonical, alias or shorthand) → canonical name."""
        return _names(cls)

    @classmethod
    def headings(cls) -> Mapping[str, str]:
        """Canonical name → the heading under which help lists the field."""
        headings, current = {}, cls.help_heading
        for name in cls.model_fields:
            current = cls.setting_of(name).heading or current
            headings[name] = current
        return headings

    @classmethod
    def translate(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Replace shorthands by canonical names and values. Sections that have shorthands override this."""
        return dict(values)

    @classmethod
    def normalize(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Turn values by any name into values by canonical name.

        Raises:
            UsageError: A name is unknown, or two names of one setting have different values.
        """
        for given in values:
            if given not in cls.names():
                raise UsageError(unknown_name(given, cls.__name__, cls.names()))
        normalized: dict[str, Any] = {}
        given_as: dict[str, str] = {}
        for given, value in cls.translate(values).items():
            name = cls.names()[given]
            if name in normalized and normalized[name] != value:
                raise UsageError(
                    f"{given_as[name]}={normalized[name]!r} and {given}={value!r} set the same option "
                    f"({name}) to "
                    "different values; give one of them"
                )
            normalized[name], given_as[name] = value, given
        return {name: _coerce(cls, name, value) for name, value in normalized.items()}

    def is_set(self, name: str) -> bool:
        """Whether the user set this field. Defaults of the class, the model family or the command do not
        count.
        """
        return name in self.model_fields_set

    @model_validator(mode="before")
    @classmethod
    def _accept_every_name(cls, values: Any) -> Any:
        return (
            cls.normalize({str(key): value for key, value in values.items()})
            if isinstance(values, Mapping)
            else values
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            return super().__setattr__(name, value)
        for canonical, translated in type(self).normalize({name: value}).items():
            super().__setattr__(canonical, check_value(type(self), canonical, translated))

    def __getattr__(self, name: str) -> Any:
        canonical = type(self).names().get(name) if not name.startswith("_") else None
        if canonical is None or canonical == name:
            return super().__getattr__(name)  # type: ignore[misc]
        return getattr(self, canonical)


@functools.cache
def _names(section: type[Section]) -> Mapping[str, str]:
    table: dict[str, str] = {}
    for name in section.model_fields:
        declared = section.setting_of(name)
        for other in (name, *declared.aliases, *declared.shorthands):
            assert table.get(other, name) == name, f"{section.__name__}: {other} names two fields"
            table[other] = name
    return table


@functools.cache
def _adapter(section: type[Section], name: str) -> TypeAdapter[Any]:
    field = section.model_fields[name]
    bounded: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    return TypeAdapter(
        bounded, config=ConfigDict(allow_inf_nan=False) if float in accepted_types(section, name) else None
    )


def check_value(section: type[Section], name: str, value: object, label: str | None = None) -> object:
    """Validate a value for one field.

    Args:
        section: The section of the field.
        name: The field's canonical name.
        value: The value to validate.
        label: What an error message calls the field; None: `name`.

    Returns:
        The value as the field's type.

    Raises:
        UsageError: The value is not valid.
    """
    try:
        return _adapter(section, name).validate_python(value)
    except ValidationError as error:
        raise UsageError(validation_message(error, section, name=name, label=label)) from None


@functools.cache
def accepted_types(section: type[Section], name: str) -> frozenset[object]:
    """The types that a field accepts, flattened: `{int, NoneType}`, `{list, 'wandb', 'tensorboard'}`. Of a
    `Literal` the set holds the values themselves.
    """

    def flat(annotation: object) -> set[object]:
        origin = typing.get_origin(annotation)
        if origin in (Union, types.UnionType):
            return set().union(*(flat(part) for part in typing.get_args(annotation)))
        if origin is Literal:
            return set(typing.get_args(annotation))
        if origin is Annotated:
            return flat(typing.get_args(annotation)[0])
        return {origin or annotation}

    return frozenset(flat(section.model_fields[name].annotation))


@functools.cache
def list_choices(section: type[Section], name: str) -> tuple[object, ...]:
    """The values that the items of a list may have (`list[Literal[...]]`); empty for other fields."""

    def of(annotation: object) -> tuple[object, ...]:
        origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
        if origin is list:
            return typing.get_args(inner[0]) if typing.get_origin(inner[0]) is Literal else ()
        return tuple(choice for part in inner for choice in of(part)) if origin is not Literal else ()

    return of(section.model_fields[name].annotation)


def _coerce(section: type[Section], name: str, value: object) -> object:
    """Conversions that pydantic does not do: a text for a list is split, and a boolean is not a number."""
    accepted = accepted_types(section, name)
    if list in accepted and isinstance(value, str):
        return split_list(value, section.setting_of(name).split_commas)
    if isinstance(value, bool) and bool not in accepted and accepted & {int, float}:
        raise UsageError(f"invalid value for {name}: {value} is not a number")
    return value


def split_list(text: str, split_commas: bool = True) -> list[Any]:
    """Read `tensorboard,wandb`, `["a", "b"]`, `none` or the empty text as a list.

    Args:
        text: The text of a flag or a file.
        split_commas: False: commas belong to the text, which becomes a list of one.

    Raises:
        UsageError: The text starts with a bracket and is not a list.
    """
    stripped = text.strip()
    if stripped.startswith("["):
        try:
            return list(json.loads(stripped.replace("'", '"') if '"' not in stripped else stripped))
        except ValueError:
            raise UsageError(f'{text!r} is not a list; write a,b or ["a", "b"]') from None
    if not split_commas:
        return [text]
    return [] if stripped.lower() in ("", "none") else [part.strip() for part in stripped.split(",")]


_BOOLEAN_WORDS = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}


def as_boolean(name: str, value: object) -> bool:
    """Read a boolean, 0, 1 or a word such as `yes`; raises UsageError for anything else."""
    if str(value).lower() not in _BOOLEAN_WORDS:
        raise UsageError(f"invalid value for {name}: {value!r} is not true or false")
    return _BOOLEAN_WORDS[str(value).lower()]


def on_or_off(value: object) -> object:
    """`on` or `off` for a boolean or a word for one; anything else is returned as it is."""
    known = _BOOLEAN_WORDS.get(str(value).lower())
    return value if known is None else "on" if known else "off"


# How pydantic names the member of a union that it tried.
_UNION_MEMBERS = ("constrained-", "literal[")


def validation_message(
    error: ValidationError, section: type[Section], *, name: str | None = None, label: str | None = None
) -> str:
    """pydantic's errors in a user's words: the setting, its value and what is allowed.

    Args:
        error: What pydantic raised.
        section: The section that was validated.
        name: The field's canonical name where a single value was validated.
        label: What the message calls this field; None: `name`.

    Returns:
        One line per error.
    """
    lines = []
    for detail in error.errors(include_url=False):
        parts = [str(part) for part in detail["loc"] if not str(part).startswith(_UNION_MEMBERS)]
        if parts and isinstance(detail["loc"][-1], int):
            parts.pop()  # the position in a list; the value names the item
        path = ".".join([*([label or name] if name else []), *parts]) or section.__name__
        field = name if name and not parts else parts[0] if not name and len(parts) == 1 else None
        interval = _interval(section, field) if field and detail["type"] in _BOUND_ERRORS else None
        reason = f" is not in {interval}" if interval else f" ({_reason(detail)})"
        lines.append(f"invalid value for {path}: {detail['input']!r}{reason}")
    return "\n".join(dict.fromkeys(lines))


_BOUND_ERRORS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


def _interval(section: type[Section], name: str) -> str | None:
    """`[0, 1)` for a field with two bounds, else None."""
    bounds: dict[str, Any] = {}
    for item in section.model_fields[name].metadata:
        bounds |= {bound: getattr(item, bound) for bound in ("ge", "gt", "le", "lt") if hasattr(item, bound)}
    if not bounds.keys() & {"ge", "gt"} or not bounds.keys() & {"le", "lt"}:
        return None
    lower = f"[{bounds['ge']}" if "ge" in bounds else f"({bounds['gt']}"
    return f"{lower}, {bounds['le']}]" if "le" in bounds else f"{lower}, {bounds['lt']})"


# pydantic's types of errors that mean the same to a user.
_REQUIRED_TYPES = {
    "int_parsing": "must be an integer",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
}


def _reason(detail: ErrorDetails) -> str:
    if detail["type"] in _REQUIRED_TYPES:
        return _REQUIRED_TYPES[detail["type"]]
    if detail["type"] == "string_type" and isinstance(detail["input"], bool):
        return "must be text; put it in quotes, since YAML reads yes, no, on and off as true and false"
    message = detail["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be a valid string", "must be text; put it in quotes").replace(
        "Input should be", "must be"
    )
    return message[0].lower() + message[1:]


def unknown_name(given: str, where: str, known: Mapping[str, Any], kind: str = "setting") -> str:
    """The message for a name that does not exist, with the closest ones that do. `kind` is what it names."""
    if kind == "setting" and given in INSTEAD:
        return f"{where} has no setting named {given!r}, as TrainingArguments has; {INSTEAD[given]}"
    close = difflib.get_close_matches(given, list(known), n=3, cutoff=0.6)
    names = " or ".join([", ".join(close[:-1]), *close[-1:]] if len(close) > 1 else close)
    hint = f"; did you mean {names}?" if close else ""
    return f"{where} has no {kind} named {given!r}{hint}"
