"""Turns records into texts: fills in a loader's template, and applies its filters.

Values are texts, numbers, lists or conversations. A template's field may have a format, which converts a
value that is not a text. A CSV cell that contains a list as JSON is treated as that list.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llm_trainer.config.schema.domain_loaders import DomainLoader, TemplateField, parse_template
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
    """A record that does not become a text; the message is the reason, one of a few fixed phrases."""


@dataclass(frozen=True)
class _Template:
    """The paragraphs of a text, each a list of literal texts and fields."""

    paragraphs: Sequence[Sequence[str | TemplateField]]

    @property
    def required(self) -> set[str]:
        """The names of the fields that a record must have."""
        return {
            item.name
            for paragraph in self.paragraphs
            for item in paragraph
            if isinstance(item, TemplateField) and not item.is_optional
        }


class RecordFormatter:
    """Accepts or rejects the records of one loader, and formats their texts.

    Args:
        loader: The loader's definition.
        options: The user's options for it.
    """

    def __init__(self, loader: DomainLoader, options: LoaderOptions) -> None:
        self._loader, self._options = loader, options
        self._templates = [
            _Template([parse_template(part) for part in template.parts(options.include_cot)])
            for template in loader.templates
        ]
        wanted = "hard" if options.filter_hard else options.difficulty
        levels = None if wanted is None else loader.difficulty_levels.get(wanted, [wanted])
        self._levels = None if levels is None else {level.casefold() for level in levels}
        self._domains = {
            part.name.rpartition("/")[2]: part.domain for part in loader.hub if part.domain is not None
        }

    def text(self, fields: Mapping[str, object]) -> str:
        """Return the text of a record.

        Args:
            fields: The record's values by field name.

        Raises:
            RecordRejected: The loader's filters or the options exclude the record, or it has no usable text.
        """
        for name, values in self._loader.keep.items():
            if not _is_one_of(fields.get(name), values):
                raise RecordRejected(f"other {name}")
        for name, values in self._loader.drop.items():
            if _is_one_of(fields.get(name), values):
                raise RecordRejected(f"other {name}")
        if (
            self._levels is not None
            and str(fields.get(self._loader.difficulty_field or "")).casefold() not in self._levels
        ):
            raise RecordRejected("other difficulty")
        try:
            text = self._fill(fields)
        except RecursionError:
            raise RecordRejected("nested too deeply") from None
        if len(text) < self._options.min_length:
            raise RecordRejected(f"shorter than min_length {self._options.min_length}")
        if self._options.max_length is not None and len(text) > self._options.max_length:
            raise RecordRejected(f"longer than max_length {self._options.max_length}")
        return text

    def domain(self, fields: Mapping[str, object], part: str) -> str:
        """Return the domain of a record.

        Args:
            fields: The record's values by field name.
            part: The file that it is from, or the dataset on the hub.
        """
        of_record = self._loader.domain_map.get(str(fields.get(self._loader.domain_field or "")))
        of_part = next((domain for name, domain in self._domains.items() if name in part), None)
        return of_record or of_part or self._loader.domain

    def _fill(self, fields: Mapping[str, object]) -> str:
        template = next((one for one in self._templates if one.required <= fields.keys()), None)
        if template is None:
            missing = sorted(self._templates[0].required - fields.keys())
            raise RecordRejected(f"no field {missing[0]!r}")
        paragraphs = [
            filled
            for paragraph in template.paragraphs
            if (filled := _fill_paragraph(paragraph, fields)) is not None
        ]
        text = "\n\n".join(paragraphs).strip()
        if not text or "\0" in text or (not text.isascii() and _has_lone_surrogate(text)):
            raise RecordRejected("empty" if not text else "not a text")
        return text


def _fill_paragraph(paragraph: Sequence[str | TemplateField], fields: Mapping[str, object]) -> str | None:
    """The paragraph with its fields filled in; None if an optional field is empty.

    Raises RecordRejected if a required field is empty.
    """
    filled = []
    for item in paragraph:
        if isinstance(item, str):
            filled.append(item)
            continue
        value = as_text(fields.get(item.name), item.format).strip()
        if not value and item.is_optional:
            return None
        if not value:
            raise RecordRejected(f"empty field {item.name!r}")
        filled.append(value)
    return "".join(filled)


def as_text(value: object, field_format: str | None) -> str:
    """Convert a field's value to a text.

    Args:
        value: The value; None becomes the empty text.
        field_format: One of the formats of templates, for instance "first" or "turns"; None for a plain
            value.

    Raises:
        RecordRejected: The format cannot convert the value.
    """
    return _plain(value) if field_format is None else _FORMATS[field_format](_parsed(value))


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
    if isinstance(value, Mapping):  # a list of records that is stored as columns
        columns = {
            str(name): column
            for name, column in value.items()
            if isinstance(column, Sequence) and not isinstance(column, str)
        }
        value = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=False)]
    turns = [_turn(turn) for turn in _items(value) if isinstance(turn, Mapping)]
    return "\n\n".join(f"{speaker}: {text}" for speaker, text in turns if text)


def _turn(turn: Mapping[str, object]) -> tuple[str, str]:
    """(speaker, text) of one turn of a conversation, in any of the usual formats."""
    speaker = str(turn.get("role", turn.get("from", "")))
    text = turn.get("content", turn.get("value", turn.get("text")))
    return _SPEAKERS.get(speaker.lower(), speaker.capitalize()), text.strip() if isinstance(text, str) else ""


_FORMATS: Mapping[str, Callable[[object], str]] = {
    "first": _first,
    "last": _last,
    "lines": _plain,
    "lettered": _lettered,
    "letter": _letter,
    "turns": _turns,
}


def _is_one_of(value: object, values: Sequence[object]) -> bool:
    """Whether a value is among others, where True does not equal 1."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)


def _has_lone_surrogate(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
