"""How a setting is declared: one canonical field, every other name that it goes by, its unit and its meaning.

`setting()` wraps pydantic's `Field`. `Section` is the base of every group of settings: it takes any alias as a keyword, in a
file or in an assignment, refuses unknown names with a suggestion, and refuses two different values for one setting.

An assignment validates the one field alone, and not the section as a whole as pydantic's
`validate_assignment` would: a script may set `hidden_size` on one line and `num_attention_heads` on the next,
though the shape fits only after both.
"""

from __future__ import annotations

import difflib
import functools
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import ErrorDetails

from llm_trainer.errors import UsageError

LARGEST_SEED = 2**63 - 1  # what PyTorch's generators take


@dataclass(frozen=True)
class Setting:
    """What a field says about itself beyond its type.

    aliases: other names in the same section; paths: dotted names in other sections
    (`training.gradient_checkpointing`) that mean this field; spellings: names whose value must be translated
    (`fp16: true` → `precision: fp16`); unit: `tokens`, `steps`, `seconds`, …; owed: a value other than the
    default switches on (or off) what is not built yet; bare: the value of a flag given without one
    (`--resume`); splits: a text for a list is cut at its commas.
    """

    unit: str | None = None
    aliases: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    spellings: tuple[str, ...] = ()
    owed: bool = False
    bare: str | None = None
    splits: bool = True


def setting(
    default: Any,
    meaning: str,
    *,
    unit: str | None = None,
    aliases: tuple[str, ...] = (),
    paths: tuple[str, ...] = (),
    spellings: tuple[str, ...] = (),
    owed: bool = False,
    bare: str | None = None,
    splits: bool = True,
    **bounds: Any,
) -> Any:
    """Declare a setting; `bounds` are pydantic's (`ge`, `gt`, `le`, `lt`, `min_length`), a callable default
    is a factory.
    """
    extra = Setting(unit, aliases, paths, spellings, owed, bare, splits)
    keyword = "default_factory" if callable(default) else "default"
    return Field(description=meaning, json_schema_extra={"setting": extra}, **{keyword: default}, **bounds)  # type: ignore[dict-item]


class Section(BaseModel):
    """A group of settings. Keyword arguments, file keys and assignments work by any alias and are validated."""

    model_config = ConfigDict(
        extra="forbid", protected_namespaces=(), use_enum_values=True, allow_inf_nan=False
    )

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
        """Every name that this section answers to, canonical, alias or spelling → canonical name."""
        return _names(cls)

    @classmethod
    def translate(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Turn spellings with a meaning of their own into canonical values; sections that have any override
        this.
        """
        return dict(values)

    @classmethod
    def settle(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values by any name → values by canonical name.

        Raises UsageError for a name that the section does not know and for two names of one setting with
        different values.
        """
        for given in values:
            if given not in cls.names():
                raise UsageError(unknown_name(given, cls.__name__, cls.names()))
        settled: dict[str, Any] = {}
        said: dict[str, str] = {}
        for given, value in cls.translate(values).items():
            name = cls.names()[given]
            if name in settled and settled[name] != value:
                raise UsageError(
                    f"{said[name]}={settled[name]!r} and {given}={value!r} are two names of one setting ({name}); give one value"
                )
            settled[name], said[name] = value, given
        return {name: _coerce(cls, name, value) for name, value in settled.items()}

    def is_said(self, name: str) -> bool:
        """Whether this field was given by the user, rather than by a default of the class, the family or the
        door.
        """
        return name in self.model_fields_set

    @model_validator(mode="before")
    @classmethod
    def _accept_every_name(cls, values: Any) -> Any:
        return (
            cls.settle({str(key): value for key, value in values.items()})
            if isinstance(values, Mapping)
            else values
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            return super().__setattr__(name, value)
        for canonical, translated in type(self).settle({name: value}).items():
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
        for spelling in (name, *declared.aliases, *declared.spellings):
            assert table.setdefault(spelling, name) == name, (
                f"{section.__name__}: {spelling} names two fields"
            )
    return table


@functools.cache
def _adapter(section: type[Section], name: str) -> TypeAdapter[Any]:
    field = section.model_fields[name]
    bounded: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    return TypeAdapter(
        bounded, config=ConfigDict(allow_inf_nan=False) if float in kinds_of(section, name) else None
    )


def check_value(section: type[Section], name: str, value: object, label: str | None = None) -> object:
    """A value for one field, by its canonical name, as the field's type; raises UsageError that calls it
    `label`.
    """
    try:
        return _adapter(section, name).validate_python(value)
    except ValidationError as error:
        raise UsageError(validation_message(error, section, label=label or name)) from None


@functools.cache
def kinds_of(section: type[Section], name: str) -> frozenset[object]:
    """The types that a field takes, flattened: {int, NoneType}, {list, 'wandb', 'tensorboard'}; literals
    stand for themselves.
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


def _coerce(section: type[Section], name: str, value: object) -> object:
    """What pydantic leaves open: texts for lists are split, booleans are not numbers."""
    kinds = kinds_of(section, name)
    if list in kinds and isinstance(value, str):
        return split_list(value, section.setting_of(name).splits)
    if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
        raise UsageError(f"{name}={value} is not a number")
    return value


def split_list(said: str, splits: bool = True) -> list[Any]:
    """`tensorboard,wandb`, `["a", "b"]`, `none` and the empty text as lists; without `splits` commas belong
    to the text.
    """
    text = said.strip()
    if text.startswith("["):
        try:
            return list(json.loads(text.replace("'", '"') if '"' not in text else text))
        except ValueError:
            raise UsageError(f'{said!r} is not a list; write a,b or ["a", "b"]') from None
    if not splits:
        return [said]
    return [] if text.lower() in ("", "none") else [part.strip() for part in text.split(",")]


_TRUTH = {
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
    """True or False from a boolean, 0, 1 or a word for them; raises UsageError otherwise."""
    if str(value).lower() not in _TRUTH:
        raise UsageError(f"{name}={value!r} must be true or false")
    return _TRUTH[str(value).lower()]


def switch_word(value: object) -> object:
    """`on` or `off` for a boolean or a word for one; anything else is left for the field to judge."""
    known = _TRUTH.get(str(value).lower())
    return value if known is None else "on" if known else "off"


# How pydantic names the one of several kinds that it tried.
_KINDS_IN_A_UNION = ("constrained-", "literal[")


def validation_message(error: ValidationError, section: type[Section], *, label: str | None = None) -> str:
    """pydantic's complaints in a user's words: setting, value, what is allowed. `label` names a value judged
    without its field.
    """
    lines = []
    for detail in error.errors(include_url=False):
        parts = (str(part) for part in detail["loc"] if not str(part).startswith(_KINDS_IN_A_UNION))
        place = ".".join([*([label] if label else []), *parts]) or section.__name__
        lines.append(f"{place}={detail['input']!r}: {_complaint(detail)}")
    return "\n".join(dict.fromkeys(lines))


def _complaint(detail: ErrorDetails) -> str:
    message = detail["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be a valid string", "must be text; put it in quotes").replace(
        "Input should be", "must be"
    )
    return message[0].lower() + message[1:]


def unknown_name(given: str, where: str, known: Mapping[str, Any] | Callable[[], Mapping[str, Any]]) -> str:
    """The message for a name that nobody declared, with the closest known ones."""
    names = known() if callable(known) else known
    close = difflib.get_close_matches(given, list(names), n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"{where} has no setting named {given!r}{hint}"
