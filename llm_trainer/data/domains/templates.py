"""From a record to a text: a loader's template filled in, and its filters.

Values are texts, numbers, lists, or conversations; a template says how a value that is not a text becomes
one. A CSV cell that holds a list as JSON counts as that list.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llm_trainer.config.schema.domain_loaders import DomainLoader, Place, parse_part
from llm_trainer.config.schema.domains import LoaderOptions

_SPEAKERS = {
    "human": "User",
    "user": "User",
    "prompter": "User",
    "gpt": "Assistant",
    "assistant": "Assistant",
    "model": "Assistant",
}


class RecordRejected(Exception):
    """A record that gives no text; the message is the reason, in a few fixed words."""


@dataclass(frozen=True)
class _Form:
    parts: Sequence[Sequence[str | Place]]

    @property
    def required(self) -> set[str]:
        return {
            piece.name
            for part in self.parts
            for piece in part
            if isinstance(piece, Place) and not piece.is_optional
        }


class RecordFormatter:
    """One loader with its options: decides about records and makes their texts."""

    def __init__(self, row: DomainLoader, options: LoaderOptions) -> None:
        self._row, self._options = row, options
        self._forms = [
            _Form([parse_part(part) for part in form.parts(options.include_cot)]) for form in row.forms
        ]
        wanted = "hard" if options.filter_hard else options.difficulty
        levels = None if wanted is None else row.difficulty_levels.get(wanted, [wanted])
        self._levels = None if levels is None else {level.casefold() for level in levels}
        self._domains = {
            part.name.rpartition("/")[2]: part.domain for part in row.hub if part.domain is not None
        }

    def text(self, fields: Mapping[str, object]) -> str:
        """The text of a record; raises Unfit."""
        for name, values in self._row.keep.items():
            if not _is_one_of(fields.get(name), values):
                raise RecordRejected(f"other {name}")
        for name, values in self._row.drop.items():
            if _is_one_of(fields.get(name), values):
                raise RecordRejected(f"other {name}")
        if (
            self._levels is not None
            and str(fields.get(self._row.difficulty_field or "")).casefold() not in self._levels
        ):
            raise RecordRejected("other difficulty")
        try:
            text = self._filled(fields)
        except RecursionError:
            raise RecordRejected("nested too deeply") from None
        if len(text) < self._options.min_length:
            raise RecordRejected(f"shorter than min_length {self._options.min_length}")
        if self._options.max_length is not None and len(text) > self._options.max_length:
            raise RecordRejected(f"longer than max_length {self._options.max_length}")
        return text

    def domain(self, fields: Mapping[str, object], part: str) -> str:
        """The domain of a record of this part (a file's name, or the data set's on the hub)."""
        said = self._row.domain_map.get(str(fields.get(self._row.domain_field or "")))
        of_part = next((domain for name, domain in self._domains.items() if name in part), None)
        return said or of_part or self._row.domain

    def _filled(self, fields: Mapping[str, object]) -> str:
        form = next((form for form in self._forms if form.required <= fields.keys()), None)
        if form is None:
            missing = sorted(self._forms[0].required - fields.keys())
            raise RecordRejected(f"no field {missing[0]!r}")
        parts = [filled for part in form.parts if (filled := _part(part, fields)) is not None]
        text = "\n\n".join(parts).strip()
        if not text or "\0" in text or (not text.isascii() and _has_lone_surrogate(text)):
            raise RecordRejected("empty" if not text else "not a text")
        return text


def _part(pieces: Sequence[str | Place], fields: Mapping[str, object]) -> str | None:
    """A part filled in; None where an optional field of it is empty. Raises Unfit where a required one is."""
    filled = []
    for piece in pieces:
        if isinstance(piece, str):
            filled.append(piece)
            continue
        value = as_text(fields.get(piece.name), piece.way).strip()
        if not value and piece.is_optional:
            return None
        if not value:
            raise RecordRejected(f"empty field {piece.name!r}")
        filled.append(value)
    return "".join(filled)


def as_text(value: object, way: str | None) -> str:
    """A field's value as text, in the way that the template says; nothing for None. Raises Unfit for what
    that way cannot take.
    """
    return _plain(value) if way is None else _WAYS[way](_parsed(value))


def _parsed(value: object) -> object:
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            parsed: object = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return parsed
    return value


def _plain(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, (str, bool, int, float)):
        return str(value)
    if isinstance(value, Mapping):
        return _turn(value)[1]
    if isinstance(value, Sequence):
        return "\n".join(_plain(item) for item in value)
    raise RecordRejected("a field of an unknown kind")


def _items(value: object) -> Sequence[object]:
    if value is None:
        return []
    return value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else [value]


def _first(value: object) -> str:
    items = _items(value)
    return _plain(items[0]) if items else ""


def _last(value: object) -> str:
    items = _items(value)
    return _plain(items[-1]) if items else ""


def _lettered(value: object) -> str:
    return "\n".join(
        f"{letter}. {_plain(item)}"
        for letter, item in zip(string.ascii_uppercase, _items(value), strict=False)
    )


def _letter(value: object) -> str:
    shown = _first(value).strip()
    if not shown.isdecimal() or int(shown) >= len(string.ascii_uppercase):
        return shown if shown in string.ascii_uppercase else ""
    return string.ascii_uppercase[int(shown)]


def _turns(value: object) -> str:
    if isinstance(value, Mapping):  # a list of records stored as columns
        columns = {
            str(name): column
            for name, column in value.items()
            if isinstance(column, Sequence) and not isinstance(column, str)
        }
        value = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=False)]
    said = [_turn(turn) for turn in _items(value) if isinstance(turn, Mapping)]
    return "\n\n".join(f"{speaker}: {text}" for speaker, text in said if text)


def _turn(turn: Mapping[str, object]) -> tuple[str, str]:
    """(speaker, text) of one turn, in any of the usual forms."""
    speaker = str(turn.get("role", turn.get("from", "")))
    text = turn.get("content", turn.get("value", turn.get("text")))
    return _SPEAKERS.get(speaker.lower(), speaker.capitalize()), text.strip() if isinstance(text, str) else ""


_WAYS: Mapping[str, Callable[[object], str]] = {
    "first": _first,
    "last": _last,
    "lines": _plain,
    "lettered": _lettered,
    "letter": _letter,
    "turns": _turns,
}


def _is_one_of(value: object, values: Sequence[object]) -> bool:
    """Equality that tells True from 1."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)


def _has_lone_surrogate(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
