"""From raw values, given anywhere and under any name, to one value per setting and where it came from.

A source is one file, one command line or one preset. Each source is normalized on its own: every name is
resolved to its field, shorthands are translated, and two values for one setting are an error that names both.
Then the sources are merged, and there a later one simply wins: a flag that differs from a file is not a
contradiction.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llm_trainer.config.schema.base import Section, unknown_name
from llm_trainer.config.schema.run_config import dotted_aliases, section_class, section_types
from llm_trainer.errors import UsageError

COMMAND_OPTIONS = ""  # the section of a command's own options

FieldKey = tuple[str, str]  # section, canonical name


@dataclass(frozen=True)
class RawValue:
    """One value as it was given.

    Attributes:
        name: Flat, dotted or an alias.
        value: The value, not validated yet.
        source: Where it was given, for messages: a flag, a file, `preset NAME`, `default of COMMAND`.
        section: The section, where a file named it.
    """

    name: str
    value: object
    source: str
    section: str | None = None


@dataclass(frozen=True)
class ResolvedValue:
    """The value of one setting and where it came from."""

    value: object
    origin: str


@dataclass(frozen=True)
class SettingNames:
    """Which settings a command reads, and what the names on its command line mean.

    Attributes:
        sections: Sections (`training`) or single settings (`data.data_dir`), in the order in which a flat
            name is looked up.
        options: The command's own options, which are looked up first.
    """

    sections: tuple[str, ...]
    options: type[Section] | None = None

    def section_class(self, section: str) -> type[Section]:
        """The class of a section, including the one of the command's own options."""
        if section == COMMAND_OPTIONS:
            assert self.options is not None
            return self.options
        return section_class(section)

    def reads(self, section: str, name: str) -> bool:
        """Whether the command reads this setting, given by its canonical name."""
        return section == COMMAND_OPTIONS or section in self.sections or f"{section}.{name}" in self.sections

    def fields(self) -> list[FieldKey]:
        """Every (section, canonical name) that the command reads, its own options first."""
        found = [(COMMAND_OPTIONS, name) for name in self.options.model_fields] if self.options else []
        for entry in self.sections:
            section, dot, name = entry.partition(".")
            names = [name] if dot else section_class(section).model_fields
            found += [(section, name) for name in names]
        return list(dict.fromkeys(found))

    def table(self) -> Mapping[str, FieldKey]:
        """Flat name → (section, the name as that section knows it)."""
        found: dict[str, FieldKey] = {}
        for section, field in self.fields():
            for name, canonical in self.section_class(section).names().items():
                if canonical == field:
                    found.setdefault(name, (section, name))
        return found

    def find(self, raw: RawValue) -> FieldKey:
        """Resolve the name of a raw value.

        Returns:
            The section, and the name as that section knows it.

        Raises:
            UsageError: There is no such setting.
        """
        name = raw.name.replace("-", "_")
        dotted = f"{raw.section}.{name}" if raw.section else name
        if dotted in dotted_aliases():
            return dotted_aliases()[dotted]
        section, dot, rest = dotted.partition(".")
        if not dot:
            table = _table(self)
            if name not in table:
                raise UsageError(f"{raw.source}: {unknown_name(name, 'this command', table)}")
            return table[name]
        if section not in section_types():
            message = unknown_name(section, "a run configuration", section_types(), "section")
            raise UsageError(f"{raw.source}: {message}")
        kind = section_class(section)
        head = rest.partition(".")[0]
        if head not in kind.names():
            elsewhere = [
                f"{other}.{head}" for other, type_ in section_types().items() if head in type_.names()
            ]
            hint = f"; {' and '.join(elsewhere)} exist" if elsewhere else ""
            raise UsageError(f"{raw.source}: {unknown_name(head, repr(section), kind.names())}{hint}")
        return section, rest


@functools.cache
def _table(names: SettingNames) -> Mapping[str, FieldKey]:
    return names.table()


def normalize(items: Iterable[RawValue], names: SettingNames) -> dict[FieldKey, ResolvedValue]:
    """Normalize the values of one source.

    Args:
        items: The raw values of the source.
        names: The settings that may be given.

    Returns:
        (section, canonical name) → value.

    Raises:
        UsageError: A name is unknown, or one setting has two different values; both are named.
    """
    grouped: dict[str, dict[str, RawValue]] = {}
    for item in items:
        section, name = names.find(item)
        _add(grouped.setdefault(section, {}), name, item)
    normalized: dict[FieldKey, ResolvedValue] = {}
    for section, given in grouped.items():
        kind = names.section_class(section)
        _check_aliases_agree(kind, given)
        values = _nested({name: item.value for name, item in given.items()})
        try:
            translated = kind.normalize(values)
        except UsageError as error:
            where = ", ".join(
                dict.fromkeys(item.source for item in given.values() if item.name in str(error))
            )
            raise UsageError(f"{where}: {error}" if where else str(error)) from None
        for name, value in translated.items():
            sources = dict.fromkeys(
                item.source for alias, item in given.items() if kind.names()[alias.partition(".")[0]] == name
            )
            normalized[section, name] = ResolvedValue(value, ", ".join(sources))
    return normalized


def _add(given: dict[str, RawValue], name: str, item: RawValue) -> None:
    """Add a value under its name. The same value may be given again (by a dotted alias, or by a repeated
    flag).
    """
    before = given.get(name)
    if before is not None and before.value != item.value:
        raise UsageError(_contradiction(before, item))
    given[name] = item


def _check_aliases_agree(kind: type[Section], given: Mapping[str, RawValue]) -> None:
    """Raises UsageError for two aliases of one field with different values. `translate` checks shorthands."""
    first: dict[str, RawValue] = {}
    for name, item in given.items():
        canonical = kind.names()[name.partition(".")[0]]
        if "." in name or name in kind.setting_of(canonical).shorthands:
            continue
        value = kind.normalize({name: item.value}).get(canonical)
        before = first.setdefault(canonical, item)
        if before is not item and kind.normalize({canonical: before.value}).get(canonical) != value:
            raise UsageError(_contradiction(before, item))


def _contradiction(one: RawValue, other: RawValue) -> str:
    return f"{_shown(one)} and {_shown(other)} set the same option to different values; give one of them"


def _shown(raw: RawValue) -> str:
    if raw.source.startswith("--"):
        return f"{raw.source}={raw.value!r}"
    return f"{raw.section + '.' if raw.section else ''}{raw.name}={raw.value!r} ({raw.source})"


def _nested(values: Mapping[str, object]) -> dict[str, object]:
    """`rope_scaling.factor: 2` → `rope_scaling: {factor: 2}`."""
    nested: dict[str, object] = {}
    for name, value in values.items():
        head, dot, rest = name.partition(".")
        if not dot:
            nested[head] = value
            continue
        inner = nested.setdefault(head, {})
        if not isinstance(inner, dict):
            raise UsageError(f"{head}={inner!r} and {name}={value!r} contradict each other; give one of them")
        inner[rest] = value
    return nested
