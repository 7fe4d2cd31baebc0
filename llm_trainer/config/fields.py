"""How a setting is declared: one canonical field, every other name that it goes by, its unit and its meaning.

`setting()` wraps pydantic's `Field`. `Section` is the base of every group of settings: it takes any alias as a keyword, in a
file or in an assignment, refuses unknown names with a suggestion, and refuses two different values for one setting.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llm_trainer.config.errors import UsageError


@dataclass(frozen=True)
class Setting:
    """What a field says about itself beyond its type.

    aliases: other names in the same section; paths: dotted names in other sections (`training.gradient_checkpointing`) that mean this
    field; spellings: names whose value must be translated (`fp16: true` → `precision: fp16`); unit: `tokens`, `steps`, `seconds`, …;
    owed: the value other than the default switches on a feature that is not built yet.
    """

    unit: str | None = None
    aliases: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    spellings: tuple[str, ...] = ()
    owed: bool = False


def setting(
    default: Any,
    meaning: str,
    *,
    unit: str | None = None,
    aliases: tuple[str, ...] = (),
    paths: tuple[str, ...] = (),
    spellings: tuple[str, ...] = (),
    owed: bool = False,
    **bounds: Any,
) -> Any:
    """Declare a setting; `bounds` are pydantic's (`ge`, `gt`, `le`, `lt`, `min_length`), a callable default is a factory."""
    extra = Setting(unit, aliases, paths, spellings, owed)
    keyword = "default_factory" if callable(default) else "default"
    return Field(description=meaning, json_schema_extra={"setting": extra}, **{keyword: default}, **bounds)  # type: ignore[dict-item]


class Section(BaseModel):
    """A group of settings. Keyword arguments, file keys and assignments work by any alias and are validated."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=(), use_enum_values=True)

    @classmethod
    def setting_of(cls, name: str) -> Setting:
        """The `Setting` of the field with this canonical name."""
        extra = cls.model_fields[name].json_schema_extra
        found = extra.get("setting") if isinstance(extra, dict) else None
        return found if isinstance(found, Setting) else Setting()

    @classmethod
    def names(cls) -> dict[str, str]:
        """Every name that this section answers to, canonical, alias or spelling → canonical name."""
        table: dict[str, str] = {}
        for name in cls.model_fields:
            declared = cls.setting_of(name)
            for spelling in (name, *declared.aliases, *declared.spellings):
                table[spelling] = name
        return table

    @classmethod
    def translate(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Turn spellings with a meaning of their own into canonical values; sections that have any override this."""
        return dict(values)

    @model_validator(mode="before")
    @classmethod
    def _accept_every_name(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        table = cls.names()
        settled: dict[str, Any] = {}
        said: dict[str, str] = {}
        for given, value in cls.translate({str(key): value for key, value in values.items()}).items():
            name = table.get(given)
            if name is None:
                raise UsageError(unknown_name(given, cls.__name__, table))
            if name in settled and settled[name] != value:
                raise UsageError(f"{said[name]}={settled[name]!r} and {given}={value!r} are two names of one setting ({name}); give one value")
            settled[name], said[name] = value, given
        return settled

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            return super().__setattr__(name, value)
        table = type(self).names()
        if name not in table:
            raise UsageError(unknown_name(name, type(self).__name__, table))
        for canonical, translated in type(self).translate({name: value}).items():
            super().__setattr__(table.get(canonical, canonical), translated)

    def __getattr__(self, name: str) -> Any:
        canonical = type(self).names().get(name) if not name.startswith("_") else None
        if canonical is None or canonical == name:
            return super().__getattr__(name)  # type: ignore[misc]
        return getattr(self, canonical)


def unknown_name(given: str, where: str, known: Mapping[str, Any] | Callable[[], Mapping[str, Any]]) -> str:
    """The message for a name that nobody declared, with the closest known ones."""
    names = known() if callable(known) else known
    close = difflib.get_close_matches(given, list(names), n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"{where} has no setting named {given!r}{hint}"
