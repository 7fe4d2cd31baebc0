"""The table of domain loaders: each a row of data, no code, in `domain_loaders.yaml`; a user's own rows have
the same form.

A row says what a data set is called on the hub, which domain it is for, and how a record becomes a text. This module reads and judges rows;
`llm_trainer.data.domains.loaders` reads the data sets themselves.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from llm_trainer.config.parse.config_files import read_mapping_or_list
from llm_trainer.config.schema.base import Section, setting
from llm_trainer.errors import UsageError

TABLE_FILE = "domain_loaders.yaml"
DOMAINS = ("math", "science", "coding", "logic", "reasoning", "general")
DIFFICULTIES = ("easy", "medium", "hard")
FIELD_FORMATS = ("first", "last", "lines", "lettered", "letter", "turns")

_PLACE = re.compile(r"\{\{|\}\}|\{(?P<name>[^{}|?]+)(?P<optional>\?)?(?:\|(?P<way>[^{}]*))?\}|[{}]")
_DOMAIN = re.compile(r"[a-z0-9][a-z0-9_-]*")

Scalar = str | bool | int | float | None


@dataclass(frozen=True)
class TemplateField:
    """A field in a template: `{name}`, `{name?}` where it may be missing, `{name|way}` where its value is not
    a text yet.
    """

    name: str
    is_optional: bool
    way: str | None


def parse_template(part: str) -> list[str | TemplateField]:
    """A template taken apart: text and places. Raises UsageError for a brace without its other half and for
    an unknown way.
    """
    found: list[str | TemplateField] = []
    position = 0
    for match in _PLACE.finditer(part):
        found.append(part[position : match.start()])
        position = match.end()
        if match[0] in ("{{", "}}"):
            found.append(match[0][0])
        elif match["name"] is None:
            raise UsageError(
                f"the template {part!r} has a brace on its own at {match.start()}; write {{field}}, and {{{{ for a brace"
            )
        elif match["way"] is not None and match["way"] not in FIELD_FORMATS:
            raise UsageError(
                f"the template {part!r} says |{match['way']}; there are {', '.join(FIELD_FORMATS)}"
            )
        else:
            found.append(TemplateField(match["name"], match["optional"] is not None, match["way"]))
    return [piece for piece in (*found, part[position:]) if piece]


class HubDataset(Section):
    """Where a data set lies on the hub."""

    name: str = setting("", "its name there", min_length=1)
    configurations: list[str] = setting(list, "its configurations, all of them read; none: the only one")
    split: str = setting("train", "its split")
    files: list[str] = setting(
        list, "files of the repository that are read as they are, in place of its own form"
    )
    revision: str | None = setting(None, "a commit of the repository; none: the newest")
    domain: str | None = setting(None, "the domain of this part; none: the loader's")


class TextTemplate(Section):
    """How a record becomes a text."""

    text: list[str] = setting(list, "parts, joined by an empty line", min_length=1, split_commas=False)
    text_with_cot: list[str] | None = setting(None, "the same with the chain of thought", split_commas=False)

    def parts(self, include_cot: bool) -> list[str]:
        """The template to use."""
        return self.text_with_cot if include_cot and self.text_with_cot is not None else self.text


class DomainLoader(Section):
    """One row of the table."""

    about: str = setting("", "what it is, in a line")
    domain: str = setting("general", "the domain of its texts")
    domain_field: str | None = setting(None, "a field that decides the domain of each record")
    domain_map: dict[str, str] = setting(
        dict, "value of domain_field → domain; other values: the loader's domain"
    )
    hub: list[HubDataset] = setting(list, "where it lies on the Hugging Face hub")
    path: str | None = setting(None, "a local file or folder in place of the hub")
    forms: list[TextTemplate] = setting(
        list,
        "how a record becomes a text; the first form whose fields a record has",
        shorthands=("text", "text_with_cot"),
    )
    keep: dict[str, list[Scalar]] = setting(dict, "field → values; records with other values are left out")
    drop: dict[str, list[Scalar]] = setting(dict, "field → values; records with one of these are left out")
    difficulty_field: str | None = setting(None, "the field that says how hard a record is")
    difficulty_levels: dict[str, list[str]] = setting(dict, "easy, medium, hard → values of difficulty_field")
    licence: str = setting("not stated", "the data set's licence", aliases=("license",))
    note: str = setting("", "what to know before using it")
    verified: list[str] = setting(list, "where all this was looked up", split_commas=False)

    @classmethod
    def translate(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """`text` (and `text_with_cot`) stand for one form; `hub: name` and `hub: {…}` for a list of one part."""
        settled = dict(values)
        if "text" in settled or "text_with_cot" in settled:
            if "forms" in settled:
                raise UsageError("text and forms are two ways to say one thing; give one")
            form = {
                name: [said] if isinstance(said := settled.pop(name), str) else said
                for name in ("text", "text_with_cot")
                if name in settled
            }
            settled["forms"] = [form]
        hub = settled.get("hub")
        if isinstance(hub, (str, Mapping)):
            settled["hub"] = [{"name": hub} if isinstance(hub, str) else hub]
        return settled

    @property
    def has_cot(self) -> bool:
        """Whether `include_cot` makes a difference."""
        return any(form.text_with_cot is not None for form in self.forms)

    def domains(self) -> list[str]:
        """Every domain that its texts can belong to."""
        parts = [part.domain or self.domain for part in self.hub] or [self.domain]
        return list(
            dict.fromkeys([*parts, *([self.domain] if self.domain_field else []), *self.domain_map.values()])
        )

    def fields(self) -> list[str]:
        """The fields that a record must have, of every form, and those that filters read."""
        texts = [
            part for form in self.forms for parts in (form.text, form.text_with_cot or []) for part in parts
        ]
        places = [
            piece.name for part in texts for piece in parse_template(part) if isinstance(piece, TemplateField)
        ]
        others = [self.domain_field, self.difficulty_field]
        return list(
            dict.fromkeys([*places, *(name for name in others if name is not None), *self.keep, *self.drop])
        )

    def options(self) -> Mapping[str, type]:
        """The options that this loader takes in a bridge file, and their types."""
        found: dict[str, type] = dict(_COMMON_OPTIONS)
        if any(not part.files for part in self.hub):
            found["split"] = str
        if self.difficulty_field is not None:
            found |= {"filter_hard": bool, "difficulty": str}
        return found | ({"include_cot": bool} if self.has_cot else {})


_COMMON_OPTIONS: Mapping[str, type] = {
    "max_samples": int,
    "n_examples": int,
    "min_length": int,
    "max_length": int,
    "path": str,
}


def check_loader(name: str, row: DomainLoader) -> None:
    """Raises UsageError for a row that cannot work, naming the row and what is wrong."""
    if not row.forms:
        raise UsageError(
            f'the loader {name} has no text; say how a record becomes one: text: ["{{question}}", "{{answer}}"]'
        )
    if not row.hub and row.path is None:
        raise UsageError(
            f"the loader {name} names no data; give hub (a name on the Hugging Face hub) or path (a file or folder)"
        )
    for domain in row.domains():
        if not _DOMAIN.fullmatch(domain):
            raise UsageError(
                f"the loader {name}: a domain is a folder's name of a-z, 0-9, - and _, not {domain!r}"
            )
    unknown = [level for level in row.difficulty_levels if level not in DIFFICULTIES]
    if unknown or (row.difficulty_levels and row.difficulty_field is None):
        what = (
            f"difficulty_levels has {unknown[0]!r}" if unknown else "difficulty_levels needs difficulty_field"
        )
        raise UsageError(f"the loader {name}: {what}; the levels are {', '.join(DIFFICULTIES)}")
    try:
        row.fields()
    except UsageError as error:
        raise UsageError(f"the loader {name}: {error}") from None


def read_rows(content: object, place: str) -> dict[str, DomainLoader]:
    """Loaders by name from what a file or a setting holds; raises UsageError that names the place and the
    loader.
    """
    if not isinstance(content, Mapping):
        raise UsageError(f"{place} holds no loaders: it must be a mapping of loader → its row")
    rows: dict[str, DomainLoader] = {}
    for name, values in content.items():
        if not isinstance(values, Mapping):
            raise UsageError(f"{place}: the loader {name} must be a mapping, not {values!r}")
        try:
            rows[str(name)] = DomainLoader(**{str(key): value for key, value in values.items()})
            check_loader(str(name), rows[str(name)])
        except UsageError as error:
            message = str(error)
            raise UsageError(
                f"{place}: {message}"
                if f"loader {name}" in message
                else f"{place}: the loader {name}: {message}"
            ) from None
    return rows


def read_loader_file(path: Path) -> dict[str, DomainLoader]:
    """A user's own loaders from a YAML or JSON file."""
    return read_rows(read_mapping_or_list(path), str(path))


@functools.cache
def shipped_loaders() -> Mapping[str, DomainLoader]:
    """The table that comes with the package."""
    text = resources.files(__package__).joinpath(TABLE_FILE).read_text(encoding="utf-8")
    return read_rows(yaml.safe_load(text), TABLE_FILE)
