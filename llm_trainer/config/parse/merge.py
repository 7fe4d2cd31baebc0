"""From what was said, wherever and under whatever name, to one canonical value a setting, and where it came
from.

A source is one file, one command line, one preset. Each is settled by itself: every name finds its field,
spellings are translated, two values for one setting are an error that names both places. Then sources are
laid over one another, and there a later one simply wins: a flag over a file is not a contradiction.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llm_trainer.config.schema.base import Section, unknown_name
from llm_trainer.config.schema.run_config import home_section, path_aliases, section_types
from llm_trainer.errors import UsageError

OWN = ""  # the section of a command's own flags

Field = tuple[str, str]  # section, canonical name


@dataclass(frozen=True)
class Said:
    """One thing that was said: `name` may be flat, dotted or an alias; `section` is set where a file named
    it; `place` is for messages.
    """

    name: str
    value: object
    place: str
    section: str | None = None


@dataclass(frozen=True)
class Value:
    """A settled value and where it came from."""

    value: object
    origin: str


@dataclass(frozen=True)
class Names:
    """What names mean here: the sections (`training`) or single settings (`data.data_dir`), in the order in
    which a flat name looks them up, and the command's own section.
    """

    sections: tuple[str, ...]
    own: type[Section] | None = None

    def kind(self, section: str) -> type[Section]:
        """The class of a section, the command's own one included."""
        if section == OWN:
            assert self.own is not None
            return self.own
        return home_section(section)

    def reads(self, section: str, name: str) -> bool:
        """Whether this setting, by canonical name, is among them."""
        return section == OWN or section in self.sections or f"{section}.{name}" in self.sections

    def fields(self) -> list[Field]:
        """Every (section, canonical name) that is read, the command's own first."""
        found = [(OWN, name) for name in self.own.model_fields] if self.own else []
        for entry in self.sections:
            section, dot, name = entry.partition(".")
            found += (
                [(section, name)] if dot else [(section, name) for name in home_section(section).model_fields]
            )
        return list(dict.fromkeys(found))

    def table(self) -> Mapping[str, Field]:
        """Flat name → (section, the name as that section knows it). A command's own names come first."""
        found: dict[str, Field] = {}
        for section, field in self.fields():
            for name, canonical in self.kind(section).names().items():
                if canonical == field:
                    found.setdefault(name, (section, name))
        return found

    def find(self, said: Said) -> Field:
        """(section, name in it) of what was said; raises UsageError for names that nobody declared."""
        name = said.name.replace("-", "_")
        dotted = f"{said.section}.{name}" if said.section else name
        if dotted in path_aliases():
            return path_aliases()[dotted]
        section, dot, rest = dotted.partition(".")
        if not dot:
            table = _table(self)
            if name not in table:
                raise UsageError(f"{said.place}: {unknown_name(name, 'this command', table)}")
            return table[name]
        if section not in section_types():
            raise UsageError(
                f"{said.place}: {unknown_name(section, 'a run', section_types()).replace('setting', 'section')}"
            )
        kind = home_section(section)
        head = rest.partition(".")[0]
        if head not in kind.names():
            elsewhere = [
                f"{other}.{head}" for other, type_ in section_types().items() if head in type_.names()
            ]
            hint = f"; {' and '.join(elsewhere)} exist" if elsewhere else ""
            raise UsageError(f"{said.place}: {unknown_name(head, repr(section), kind.names())}{hint}")
        return section, rest


@functools.cache
def _table(names: Names) -> Mapping[str, Field]:
    return names.table()


def settle(items: Iterable[Said], names: Names) -> dict[Field, Value]:
    """One source's values by (section, canonical name); raises UsageError for unknown names and for
    contradictions, naming both places.
    """
    grouped: dict[str, dict[str, Said]] = {}
    for item in items:
        section, name = names.find(item)
        _keep(grouped.setdefault(section, {}), name, item)
    settled: dict[Field, Value] = {}
    for section, said in grouped.items():
        kind = names.kind(section)
        _refuse_two_values(kind, said)
        values = _nested({name: item.value for name, item in said.items()})
        try:
            translated = kind.settle(values)
        except UsageError as error:
            where = ", ".join(dict.fromkeys(item.place for item in said.values() if item.name in str(error)))
            raise UsageError(f"{where}: {error}" if where else str(error)) from None
        for name, value in translated.items():
            places = dict.fromkeys(
                item.place for given, item in said.items() if kind.names()[given.partition(".")[0]] == name
            )
            settled[section, name] = Value(value, ", ".join(places))
    return settled


def _keep(said: dict[str, Said], name: str, item: Said) -> None:
    """Add an item under its name; the same name may be said again with the same value (by a path, or by a
    flag typed twice).
    """
    before = said.get(name)
    if before is not None and before.value != item.value:
        raise UsageError(_contradiction(before, item))
    said[name] = item


def _refuse_two_values(kind: type[Section], said: Mapping[str, Said]) -> None:
    """Two aliases of one field with different values; spellings with a meaning of their own are judged by
    `translate`.
    """
    first: dict[str, Said] = {}
    for name, item in said.items():
        canonical = kind.names()[name.partition(".")[0]]
        if "." in name or name in kind.setting_of(canonical).spellings:
            continue
        one = kind.settle({name: item.value}).get(canonical)
        before = first.setdefault(canonical, item)
        if before is not item and kind.settle({canonical: before.value}).get(canonical) != one:
            raise UsageError(_contradiction(before, item))


def _contradiction(one: Said, other: Said) -> str:
    return f"{one.place} says {_shown(one)} and {other.place} says {_shown(other)}: that is one setting with two values; give one"


def _shown(said: Said) -> str:
    return f"{said.section + '.' if said.section else ''}{said.name} = {said.value!r}"


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
            raise UsageError(f"{head}={inner!r} and {name}={value!r} contradict each other")
        inner[rest] = value
    return nested
